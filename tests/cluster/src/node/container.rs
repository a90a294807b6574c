//! A container: a program in the pod's network namespace, with a root of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::process::Child;

use crate::program::logged;

/// Makes a root in memory with the machine's programs and libraries, the image's folder and the volumes, and runs the
/// program in it.
const ROOT: &str = r#"
root=$1 etc=$2 image=$3 mounts=$4; shift 4
mount -t tmpfs tmpfs "$root"
for directory in usr bin sbin lib lib64; do
    if [ -L "/$directory" ]; then cp -P "/$directory" "$root/$directory"
    elif [ -d "/$directory" ]; then mkdir "$root/$directory"; mount --bind "/$directory" "$root/$directory"
    fi
done
mkdir "$root/etc" "$root/proc" "$root/dev" "$root/tmp" "$root/image"
chmod 1777 "$root/tmp"
cp "$etc"/* "$root/etc/"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$image" "$root/image"
while [ "$mounts" -gt 0 ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; : >>"$root$2"; fi
    mount --bind "$1" "$root$2"
    shift 2; mounts=$((mounts - 1))
done
cd /
exec chroot "$root" "$@"
"#;

/// Which program an image stands for.
#[derive(Clone, Debug)]
pub struct Images(BTreeMap<String, PathBuf>);

impl Images {
    /// By the last part of an image's name, without tag or digest.
    #[must_use]
    pub fn new(programs: BTreeMap<String, PathBuf>) -> Self {
        Self(programs)
    }

    /// The program of an image.
    ///
    /// # Errors
    /// When there is none.
    pub fn program(&self, image: &str) -> anyhow::Result<&Path> {
        let name = image.split('@').next().unwrap_or_default();
        let name = name.rsplit('/').next().unwrap_or_default();
        let name = name.split(':').next().unwrap_or_default();
        self.0.get(name).map(PathBuf::as_path).with_context(|| format!("this node has no image {image}"))
    }
}

/// All that a container's start needs.
#[derive(Debug)]
pub struct Start<'a> {
    /// Its pod.
    pub pod: &'a Pod,
    /// What the pod says of it.
    pub container: &'a Container,
    /// Program of its image.
    pub program: &'a Path,
    /// Values of its variables.
    pub variables: &'a BTreeMap<String, String>,
    /// Folders of the pod's volumes.
    pub volumes: &'a BTreeMap<String, PathBuf>,
    /// Network namespace of the pod.
    pub network: &'a str,
    /// The pod's own folder.
    pub folder: &'a Path,
    /// Its log.
    pub log: &'a Path,
}

impl Start<'_> {
    /// Starts it.
    ///
    /// # Errors
    /// What the system says.
    pub fn spawn(&self) -> anyhow::Result<Child> {
        self.spawn_with(self.arguments())
    }

    /// Starts the same program with other arguments, in the same way: a hook.
    ///
    /// # Errors
    /// What the system says.
    pub fn spawn_hook(&self, command: &[String]) -> anyhow::Result<Child> {
        self.spawn_with(command.iter().skip(1).cloned().collect())
    }

    fn spawn_with(&self, arguments: Vec<String>) -> anyhow::Result<Child> {
        let root = self.folder.join(format!("{}.root", self.container.name));
        std::fs::create_dir_all(&root)?;
        let image = self.program.parent().context("a program is in a folder")?;
        let name = self.program.file_name().context("a program has a name")?;
        let mounts = self.container.volume_mounts.as_deref().unwrap_or_default();
        let mut command = logged("nsenter", self.log)?;
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/tmp")
            .envs(self.variables)
            .arg(format!("--net={}", self.network))
            .args(["unshare", "--mount", "--propagation", "private", "sh", "-ec", ROOT, "sh"])
            .arg(&root)
            .arg(self.folder.join("etc"))
            .arg(image)
            .arg(mounts.len().to_string());
        for mount in mounts {
            let volume = self.volumes.get(&mount.name).with_context(|| format!("there is no volume {}", mount.name))?;
            let source = mount.sub_path.as_ref().map_or_else(|| volume.clone(), |path| volume.join(path));
            command.arg(source).arg(&mount.mount_path);
        }
        command.arg(Path::new("/image").join(name)).args(arguments);
        Ok(command.spawn()?)
    }

    /// What follows the program's name: of a `command` all but its first, which is the program, then `args`.
    fn arguments(&self) -> Vec<String> {
        let command = self.container.command.iter().flatten().skip(1);
        command.chain(self.container.args.iter().flatten()).map(|word| expand(word, self.variables)).collect()
    }
}

/// Puts variables in place of `$(NAME)`; unknown ones stay, `$$` is `$`.
#[must_use]
pub fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        let named = rest.strip_prefix("$(").and_then(|name| name.split_once(')'));
        if let Some(after) = rest.strip_prefix("$$") {
            expanded.push('$');
            rest = after;
        } else if let Some((value, after)) = named.and_then(|(name, after)| Some((variables.get(name)?, after))) {
            expanded.push_str(value);
            rest = after;
        } else {
            expanded.push('$');
            rest = &rest[1..];
        }
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_expand_as_kubernetes_does() {
        let variables = [("A".to_owned(), "1".to_owned())].into();
        for (text, expanded) in
            [("$(A)x", "1x"), ("$$(A)", "$(A)"), ("$(B)", "$(B)"), ("$(A", "$(A"), ("$", "$"), ("é$(A)", "é1")]
        {
            assert_eq!(expand(text, &variables), expanded, "{text}");
        }
    }

    #[test]
    fn an_image_is_known_by_its_last_name() {
        let images = Images::new([("envoy".to_owned(), PathBuf::from("/e"))].into());
        for image in ["envoy", "docker.io/envoyproxy/envoy:distroless-v1.39.0", "10.0.0.1:5000/envoy@sha256:00"] {
            assert_eq!(images.program(image).unwrap(), Path::new("/e"), "{image}");
        }
        assert_eq!(images.program("x/y:1").unwrap_err().to_string(), "this node has no image x/y:1");
    }
}

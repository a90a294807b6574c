//! A container: a program in the pod's network namespace, with a root of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Container, Pod};
use pd_image::registry::Registry;
use tokio::process::Child;

use crate::program::logged;

/// Makes a root in memory with the machine's directories, the image's folder and the volumes, and runs the program in it.
const ROOT: &str = r#"
root=$1 etc=$2 image=$3 directories=$4 mounts=$5; shift 5
mount -t tmpfs tmpfs "$root"
for directory in $directories; do
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

/// The machine's directories that a program of the machine needs.
const DIRECTORIES: &str = "usr bin sbin lib lib64";

/// Which program an image stands for.
#[derive(Clone, Debug)]
pub struct Images {
    programs: BTreeMap<String, PathBuf>,
    registry: String,
    folder: PathBuf,
}

/// What a container runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it sees the machine's programs and libraries: it is none of an image.
    pub is_of_machine: bool,
}

impl Images {
    /// Programs by the last part of an image's name, without tag or digest; images of the registry are pulled into a folder.
    #[must_use]
    pub fn new(programs: BTreeMap<String, PathBuf>, registry: String, folder: PathBuf) -> Self {
        Self { programs, registry, folder }
    }

    /// The program of an image.
    ///
    /// # Errors
    /// When there is none.
    pub async fn program(&self, image: &str) -> anyhow::Result<Program> {
        if image.strip_prefix(&self.registry).is_some_and(|rest| rest.starts_with('/')) {
            let pulled = Registry::new(image, true)?.pull().await.with_context(|| image.to_owned())?;
            let folder = self.folder.join(pulled.manifest.digest.trim_start_matches("sha256:"));
            return Ok(Program { path: pulled.unpack(&folder)?, is_of_machine: false });
        }
        let name = image.split('@').next().unwrap_or_default();
        let name = name.rsplit('/').next().unwrap_or_default();
        let name = name.split(':').next().unwrap_or_default();
        let path = self.programs.get(name).with_context(|| format!("this node has no image {image}"))?;
        Ok(Program { path: path.clone(), is_of_machine: true })
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
    pub program: &'a Program,
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
        let image = self.program.path.parent().context("a program is in a folder")?;
        let name = self.program.path.file_name().context("a program has a name")?;
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
            .arg(if self.program.is_of_machine { DIRECTORIES } else { "" })
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
    while let Some(index) = rest.find('$') {
        expanded.push_str(&rest[..index]);
        rest = &rest[index..];
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

    #[tokio::test]
    async fn an_image_is_known_by_its_last_name() {
        let programs = [("envoy".to_owned(), PathBuf::from("/e"))].into();
        let images = Images::new(programs, "10.0.0.2:5000".to_owned(), PathBuf::new());
        for image in ["envoy", "docker.io/envoyproxy/envoy:distroless-v1.39.0", "10.0.0.1:5000/envoy@sha256:00"] {
            let program = images.program(image).await.unwrap();
            assert_eq!((program.path.as_path(), program.is_of_machine), (Path::new("/e"), true), "{image}");
        }
        assert_eq!(images.program("x/y:1").await.unwrap_err().to_string(), "this node has no image x/y:1");
    }
}

//! Certificates, the key of service account tokens, and a kubeconfig.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

use crate::network::{KUBERNETES, NODE, REGISTRY};

/// Name by which the API server proves to other API servers that a request comes from it.
pub const AGGREGATOR: &str = "aggregator";

/// Where the files are.
#[derive(Clone, Debug)]
pub struct Pki(PathBuf);

impl Pki {
    /// Makes everything anew.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(directory: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        let pki = Self(directory);
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "pd-cluster");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let ca_key = KeyPair::generate()?;
        pki.write("ca.crt", &ca.self_signed(&ca_key)?.pem())?;
        let issuer = Issuer::new(ca, ca_key);

        let mut server = CertificateParams::new(vec!["kubernetes.default.svc".to_owned(), "kubernetes".to_owned()])?;
        server.subject_alt_names.push(SanType::IpAddress(NODE.into()));
        server.subject_alt_names.push(SanType::IpAddress(KUBERNETES.into()));
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        let key = KeyPair::generate()?;
        pki.write("api.crt", &server.signed_by(&key, &issuer)?.pem())?;
        pki.write("api.key", &key.serialize_pem())?;

        let mut aggregator = CertificateParams::default();
        aggregator.distinguished_name.push(DnType::CommonName, AGGREGATOR);
        aggregator.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        pki.write("aggregator.crt", &aggregator.signed_by(&key, &issuer)?.pem())?;
        pki.write("aggregator.key", &key.serialize_pem())?;

        let mut registry = CertificateParams::new(vec![REGISTRY.to_owned()])?;
        registry.distinguished_name.push(DnType::CommonName, REGISTRY);
        let key = KeyPair::generate()?;
        pki.write("registry.crt", &registry.signed_by(&key, &issuer)?.pem())?;
        pki.write("registry.key", &key.serialize_pem())?;

        let accounts = KeyPair::generate()?;
        pki.write("accounts.key", &accounts.serialize_pem())?;
        pki.write("accounts.pub", &accounts.public_key_pem())?;
        // Nobody outside of the namespaces reaches the API server.
        pki.write("tokens.csv", "pd-cluster-admin,admin,1,\"system:masters\"\n")?;
        pki.write(
            "kubeconfig",
            &format!(
                "apiVersion: v1\nkind: Config\n\
                 clusters: [{{name: pd, cluster: {{server: 'https://{NODE}:6443', certificate-authority: '{}'}}}}]\n\
                 users: [{{name: admin, user: {{token: pd-cluster-admin}}}}]\n\
                 contexts: [{{name: pd, context: {{cluster: pd, user: admin}}}}]\ncurrent-context: pd\n",
                pki.path("ca.crt").display(),
            ),
        )?;
        Ok(pki)
    }

    /// One of the files.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    }
}

//! What a component of `k8s/components` changes about how pods come and go, read from its patches: a set can
//! be simulated as it would be with it.
//!
//! As of the manifests, only what is simulated is read, and a patch of anything else is refused.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::manifest::Manifest;

/// Where a pod's grace period stands in its StatefulSet.
const GRACE: &str = "/spec/template/spec/terminationGracePeriodSeconds";

/// What a component changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Component {
    /// Settings of every node, as environment variables.
    pub settings: Vec<(String, String)>,
    /// From the order to stop to SIGKILL, when it is another one.
    pub grace: Option<Duration>,
}

impl Component {
    /// Reads a component of this workspace.
    ///
    /// # Errors
    /// When it is not there, or changes something that is not simulated.
    pub fn read(name: &str) -> Result<Component> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/components").join(name);
        let path = folder.join("kustomization.yaml");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Component::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Component> {
        let kustomization: Kustomization = yaml_serde::from_str(text)?;
        let mut component = Component::default();
        for Patch { target, patch } in kustomization.patches {
            for Operation { path, value } in yaml_serde::from_str::<Vec<Operation>>(&patch)? {
                match (target.kind.as_str(), path.strip_prefix("/data/"), value) {
                    ("ConfigMap", Some(setting), Scalar::Text(value)) => {
                        component.settings.push((setting.to_owned(), value));
                    }
                    ("StatefulSet", None, Scalar::Number(seconds)) if path == GRACE => {
                        component.grace = Some(Duration::from_secs(seconds));
                    }
                    (kind, _, value) => bail!("{path} of a {kind} is not simulated: {value:?}"),
                }
            }
        }
        Ok(component)
    }

    /// The numbers of a set with this component.
    pub fn change(&self, manifest: Manifest) -> Manifest {
        Manifest { grace: self.grace.unwrap_or(manifest.grace), ..manifest }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kustomization {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    patches: Vec<Patch>,
}

#[derive(Deserialize)]
struct Patch {
    target: Target,
    patch: String,
}

#[derive(Deserialize)]
struct Target {
    kind: String,
}

#[derive(Deserialize)]
struct Operation {
    path: String,
    value: Scalar,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Scalar {
    Number(u64),
    Text(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a drain may take, as `placement.drain_seconds` has it.
    const DRAIN: Duration = Duration::from_secs(300);

    #[test]
    fn pods_that_drain_have_time_for_it() -> Result<()> {
        let component = Component::read("drain-on-stop")?;
        assert_eq!(component.settings, [("SHOAL_DRAIN_ON_STOP".to_owned(), "true".to_owned())]);
        let manifest = component.change(Manifest::read()?);
        assert!(manifest.grace > DRAIN + manifest.pre_stop, "{:?} for a drain", manifest.grace);
        Ok(())
    }

    #[test]
    fn what_is_not_simulated_is_refused() {
        let text =
            "{apiVersion: v1alpha1, kind: Component, patches: [{target: {kind: StatefulSet}, patch: PATCH}]}";
        let parse = |patch: &str| Component::parse(&text.replace("PATCH", patch));
        let grace = format!("'[{{op: replace, path: {GRACE}, value: 9}}]'");
        let read = parse(&grace).expect("it is simulated");
        assert_eq!(read, Component { grace: Some(Duration::from_secs(9)), settings: Vec::new() });
        assert!(parse("'[{op: replace, path: /spec/replicas, value: 9}]'").is_err());
    }
}

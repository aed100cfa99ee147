//! What the manifests in `k8s/base` say about how pods come and go, read from the files themselves: the
//! simulated StatefulSet does what the shipped one would, and a changed number changes the test.
//!
//! Only what is simulated is read. A probe or a lifecycle with a field that is unknown here is refused, because
//! a number that nobody heeds would make the simulation a different one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Kubernetes' pauses (minReadySeconds, preStop, the periods of probes) are so many times shorter here than the
/// manifest says, so that a test takes minutes less. The node is not made faster: the time it has to answer a
/// probe and to end is the manifest's. Towards the node a test is stricter than Kubernetes; clients are spared a
/// pod that is not ready sooner than there. A larger number would bring two readiness probes closer together
/// than the 0.8 s of an election, and pods would be taken out of service that Kubernetes would leave in it.
pub const PACE: u32 = 5;

/// A pause of Kubernetes as it is simulated.
pub fn paced(pause: Duration) -> Duration {
    pause / PACE
}

/// What `statefulset.yaml` and `configmap.yaml` say.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// The name of the set: its pods are `NAME-0`, `NAME-1` and so on.
    pub name: String,
    /// How many pods there are at first.
    pub replicas: usize,
    /// Whether pods are started and stopped together or in order.
    pub pod_management: PodManagement,
    /// How long a pod must have been ready without a break to be available.
    pub min_ready: Duration,
    /// From the order to stop to SIGKILL, with the pause of `preStop`.
    pub grace: Duration,
    /// The pause before SIGTERM, in which the pod still serves.
    pub pre_stop: Duration,
    /// Until it passes once, the other probes are not asked.
    pub startup: Probe,
    /// When it fails, the process is stopped and started again.
    pub liveness: Probe,
    /// While it passes, the service leads to the pod.
    pub readiness: Probe,
    /// What becomes of the volumes when the set is deleted.
    pub when_deleted: Retention,
    /// What becomes of the volumes of pods that a smaller set does not have.
    pub when_scaled: Retention,
    /// The ordinals of the pods in `SHOAL_JOIN`.
    pub join: Vec<usize>,
    /// `SHOAL_EXPECT`: how many nodes create the cluster together.
    pub expect: usize,
    /// The settings that a pod takes from the zone of its machine.
    pub zone_settings: Vec<String>,
}

/// The order in which pods are started, and stopped when the set shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum PodManagement {
    /// All at once.
    Parallel,
    /// From the lowest ordinal up, the next when the last is available; stopped from the highest down.
    OrderedReady,
}

/// What becomes of a volume that no pod needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Retention {
    /// It is kept for a pod of that name.
    Retain,
    /// It is deleted with everything on it.
    Delete,
}

/// An HTTP probe.
#[derive(Clone, Debug)]
pub struct Probe {
    /// What is asked for.
    pub path: String,
    /// From one question to the next.
    pub period: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// After so many failures in a row the probe has failed.
    pub failure_threshold: u32,
}

impl Manifest {
    /// Reads the manifests of this workspace.
    ///
    /// # Errors
    /// When one is not there or says something that is not simulated.
    pub fn read() -> Result<Manifest> {
        let Set { metadata, spec } = parse("statefulset.yaml")?;
        let settings: ConfigMap = parse("configmap.yaml")?;
        let strategy = &spec.update_strategy.kind;
        ensure!(strategy == "RollingUpdate", "the update strategy {strategy} is not simulated");
        let pod = spec.template.spec;
        let container = pod.containers.into_iter().next().context("the pod has no container")?;
        let of_zone = container.env.iter().filter(|variable| variable.is_zone());
        let zone_settings = of_zone.map(|variable| variable.name.clone()).collect();
        let join = settings.data.join.split(',').map(|target| ordinal(target, &metadata.name));
        Ok(Manifest {
            replicas: spec.replicas,
            pod_management: spec.pod_management_policy,
            min_ready: Duration::from_secs(spec.min_ready_seconds),
            grace: Duration::from_secs(pod.termination_grace_period_seconds),
            pre_stop: pause(&container.lifecycle.pre_stop.exec.command)?,
            startup: container.startup_probe.read()?,
            liveness: container.liveness_probe.read()?,
            readiness: container.readiness_probe.read()?,
            when_deleted: spec.persistent_volume_claim_retention_policy.when_deleted,
            when_scaled: spec.persistent_volume_claim_retention_policy.when_scaled,
            join: join.collect::<Result<_>>()?,
            expect: settings.data.expect.parse().context("SHOAL_EXPECT")?,
            zone_settings,
            name: metadata.name,
        })
    }
}

fn parse<T: DeserializeOwned>(file: &str) -> Result<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s/base").join(file);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    yaml_serde::from_str(&text).with_context(|| path.display().to_string())
}

/// The ordinal of the pod that an entry of `SHOAL_JOIN` names, such as `shoal-1.shoal-peers:6334`.
fn ordinal(target: &str, set: &str) -> Result<usize> {
    let pod = target.split('.').next().unwrap_or(target);
    let number = pod.strip_prefix(set).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
    number.with_context(|| format!("SHOAL_JOIN: {target} is no pod of {set}"))
}

/// How long a `preStop` command takes.
fn pause(command: &[String]) -> Result<Duration> {
    match command {
        [program, seconds] if program == "sleep" => Ok(Duration::from_secs(seconds.parse()?)),
        _ => bail!("preStop is more than a pause: {command:?}"),
    }
}

#[derive(Deserialize)]
struct Set {
    metadata: Metadata,
    spec: SetSpec,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SetSpec {
    replicas: usize,
    pod_management_policy: PodManagement,
    update_strategy: UpdateStrategy,
    min_ready_seconds: u64,
    persistent_volume_claim_retention_policy: RetentionPolicy,
    template: Template,
}

#[derive(Deserialize)]
struct UpdateStrategy {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RetentionPolicy {
    when_deleted: Retention,
    when_scaled: Retention,
}

#[derive(Deserialize)]
struct Template {
    spec: PodSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    termination_grace_period_seconds: u64,
    containers: Vec<Container>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    env: Vec<Variable>,
    startup_probe: ProbeSpec,
    liveness_probe: ProbeSpec,
    readiness_probe: ProbeSpec,
    lifecycle: Lifecycle,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Variable {
    name: String,
    value_from: Option<ValueFrom>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ValueFrom {
    field_ref: Option<FieldRef>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FieldRef {
    field_path: String,
}

impl Variable {
    fn is_zone(&self) -> bool {
        let field = self.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
        field.is_some_and(|field| field.field_path == "metadata.labels['topology.kubernetes.io/zone']")
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Lifecycle {
    pre_stop: PreStop,
}

#[derive(Deserialize)]
struct PreStop {
    exec: Exec,
}

#[derive(Deserialize)]
struct Exec {
    command: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ProbeSpec {
    http_get: HttpGet,
    period_seconds: u64,
    timeout_seconds: u64,
    failure_threshold: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpGet {
    path: String,
    port: String,
}

impl ProbeSpec {
    fn read(self) -> Result<Probe> {
        ensure!(self.http_get.port == "http", "a probe asks at the port {}", self.http_get.port);
        Ok(Probe {
            path: self.http_get.path,
            period: Duration::from_secs(self.period_seconds),
            timeout: Duration::from_secs(self.timeout_seconds),
            failure_threshold: self.failure_threshold,
        })
    }
}

#[derive(Deserialize)]
struct ConfigMap {
    data: Settings,
}

#[derive(Deserialize)]
struct Settings {
    #[serde(rename = "SHOAL_JOIN")]
    join: String,
    #[serde(rename = "SHOAL_EXPECT")]
    expect: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_numbers_fit_together() -> Result<()> {
        let manifest = Manifest::read()?;
        let creators: Vec<usize> = (0..manifest.expect).collect();
        assert_eq!(manifest.join, creators, "those who create the cluster are those who are looked for");
        assert!(manifest.expect <= manifest.replicas, "fewer pods than it takes to create the cluster");
        assert!(manifest.pre_stop < manifest.grace, "SIGKILL would come before SIGTERM");
        assert_eq!(manifest.zone_settings, ["SHOAL_ZONE"], "replicas would not spread over zones");
        for probe in [&manifest.startup, &manifest.liveness, &manifest.readiness] {
            assert!(probe.timeout <= probe.period, "{probe:?} asks again before it has its answer");
        }
        Ok(())
    }

    #[test]
    fn what_is_not_simulated_is_refused() {
        let text =
            "{httpGet: {path: /, port: http}, periodSeconds: 1, timeoutSeconds: 1, failureThreshold: 1}";
        assert!(yaml_serde::from_str::<ProbeSpec>(text).is_ok());
        let text = text.replace("periodSeconds", "initialDelaySeconds: 9, periodSeconds");
        assert!(yaml_serde::from_str::<ProbeSpec>(&text).is_err(), "a delay that nobody heeds");
        assert!(pause(&["rm".to_owned(), "5".to_owned()]).is_err());
        assert!(ordinal("other-1.shoal-peers:6334", "shoal").is_err());
        assert_eq!(ordinal("shoal-1.shoal-peers:6334", "shoal").ok(), Some(1));
    }
}

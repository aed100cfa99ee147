//! How many requests are in work at once, and what becomes of the rest.
//!
//! ```text
//!  request ─▶ a place? ──yes─▶ in work ──after LONG_WORK─▶ a waiting room? its place is given away
//!                 └──no──▶ in line, first come first served ──its patience ends──▶ 429
//! ```
//!
//! A node that takes in everything at once is late with everything: each request then waits inside, for
//! the log, for a replica, for the processor, and many end at their deadlines with nobody knowing what
//! became of them. So there are so many places for each core that this node may use, which is enough for
//! the log to write many entries with one sync, and whoever finds none waits where nothing has begun yet.
//!
//! Whoever takes long in work waits for something else than the processor: an election, a disk, a peer.
//! Such a request keeps nobody out: it moves on to a waiting room of its own, which is larger. Is that full
//! as well, the node is slow because it has too much to do, and nobody else is let in.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

/// Places for each core.
const PLACES_PER_CORE: f64 = 64.0;
/// The fewest places, on a small part of a core.
const LEAST_PLACES: usize = 8;
/// Requests that take long, for each place.
const LONG_PER_PLACE: usize = 4;
/// A request that is in work for longer gives its place away.
const LONG_WORK: Duration = Duration::from_secs(1);

/// Lets requests in. Cheap to clone.
#[derive(Clone)]
pub struct Admission {
    places: Arc<Semaphore>,
    /// For those in work that take long.
    long: Arc<Semaphore>,
    patience: Duration,
}

impl Admission {
    /// So many places, or as many as this node's cores are good for when that is zero; each request waits
    /// so long for one.
    pub fn new(working: usize, patience: Duration) -> Admission {
        Admission::with_places(if working == 0 { places(cores()) } else { working }, patience)
    }

    fn with_places(places: usize, patience: Duration) -> Admission {
        let long = Arc::new(Semaphore::new(LONG_PER_PLACE * places));
        Admission { places: Arc::new(Semaphore::new(places)), long, patience }
    }

    /// Does some work when there is a place for it; none when it takes too long.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let place = match self.places.try_acquire() {
            Ok(place) => place,
            Err(_) => {
                let _waiting = Counted::new("shoal_requests_waiting");
                tokio::time::timeout(self.patience, self.places.acquire()).await.ok()?.ok()?
            }
        };
        tokio::pin!(work);
        match tokio::time::timeout(LONG_WORK, &mut work).await {
            Ok(done) => Some(done),
            Err(_) => {
                let long = self.long.try_acquire();
                let _place = long.is_err().then_some(place);
                Some(work.await)
            }
        }
    }
}

/// Counts up a gauge for as long as it lives.
struct Counted(metrics::Gauge);

impl Counted {
    fn new(name: &'static str) -> Counted {
        let gauge = metrics::gauge!(name);
        gauge.increment(1.0);
        Counted(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

fn places(cores: f64) -> usize {
    ((PLACES_PER_CORE * cores).ceil() as usize).max(LEAST_PLACES)
}

/// How many cores this process may use: those of the machine, or the part of them that its cgroup has.
fn cores() -> f64 {
    let machine = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    groups.lines().filter_map(quota).fold(machine, f64::min)
}

/// The quota of one line of `/proc/self/cgroup`: `number:controllers:path`, without controllers in
/// version 2.
fn quota(line: &str) -> Option<f64> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let root = Path::new("/sys/fs/cgroup");
    let path = path.trim_start_matches('/');
    let read = |file: std::path::PathBuf| std::fs::read_to_string(file).ok();
    if controllers.is_empty() {
        // In a container the file of the own group is at the root.
        let text = read(root.join(path).join("cpu.max")).or_else(|| read(root.join("cpu.max")))?;
        let (quota, period) = text.trim().split_once(' ')?;
        return ratio(quota, period);
    }
    if !controllers.split(',').any(|controller| controller == "cpu") {
        return None;
    }
    let of = |file: &str| {
        let mounts = [format!("cpu/{path}"), format!("cpu,cpuacct/{path}"), "cpu".to_owned()];
        mounts.into_iter().find_map(|mount| read(root.join(mount).join(file)))
    };
    ratio(&of("cpu.cfs_quota_us")?, &of("cpu.cfs_period_us")?)
}

/// None when there is no quota: `max`, or -1.
fn ratio(quota: &str, period: &str) -> Option<f64> {
    let (quota, period): (f64, f64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_cores() {
        assert_eq!((places(2.0), places(0.25), places(0.01)), (128, 16, LEAST_PLACES));
        assert_eq!(
            (ratio("25000\n", "100000\n"), ratio("max", "100000"), ratio("-1", "100000")),
            (Some(0.25), None, None)
        );
        assert!(cores() > 0.0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_place_waits_and_is_then_refused() {
        let admission = Admission::with_places(1, Duration::from_millis(500));
        let first = admission.run(tokio::time::sleep(Duration::from_millis(200)));
        let second = admission.run(async { "served" });
        let (first, second) = tokio::join!(first, second);
        assert_eq!((first, second), (Some(()), Some("served")), "the second one waited for its turn");
        let work = admission.run(tokio::time::sleep(Duration::from_millis(900)));
        let (done, refused) = tokio::join!(work, admission.run(async {}));
        assert_eq!((done, refused), (Some(()), None), "nobody waits for longer than its patience");
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_long_keeps_nobody_out() {
        let admission = Admission::with_places(1, LONG_WORK + Duration::from_millis(1));
        let long = admission.run(tokio::time::sleep(10 * LONG_WORK));
        let (done, served) = tokio::join!(long, admission.run(async {}));
        assert_eq!((done, served), (Some(()), Some(())));
        assert_eq!(admission.places.available_permits(), 1, "its place is not given back twice");
        assert_eq!(admission.long.available_permits(), LONG_PER_PLACE);
    }

    #[tokio::test(start_paused = true)]
    async fn when_everybody_takes_long_nobody_else_is_let_in() {
        let admission = Admission::with_places(1, 2 * LONG_WORK);
        let long = || admission.run(tokio::time::sleep(100 * LONG_WORK));
        let late = async {
            tokio::time::sleep((LONG_PER_PLACE as u32 + 2) * 2 * LONG_WORK).await;
            admission.run(async {}).await
        };
        let all = futures::future::join_all((0..LONG_PER_PLACE + 1).map(|turn| async move {
            tokio::time::sleep(turn as u32 * 2 * LONG_WORK).await;
            long().await
        }));
        let (done, late) = tokio::join!(all, late);
        assert!(done.iter().all(Option::is_some));
        assert_eq!(late, None);
    }
}

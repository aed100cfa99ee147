//! tokio without its last two sources of chance: the generator of random numbers, and the order in
//! which those who wait for a watch are woken.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use openraft::{OptionalSend, OptionalSync, TokioRuntime};
use openraft_rt::AsyncRuntime;
use openraft_rt::deterministic_rng::DeterministicRng;
use openraft_rt::watch::{RecvError, SendError, Watch, WatchReceiver, WatchSender};
use parking_lot::{RwLock, RwLockReadGuard};
use tokio::sync::Notify;

type Base = DeterministicRng<TokioRuntime>;

/// The runtime of simulations.
#[derive(Debug)]
pub struct Seeded(Base);

impl Seeded {
    /// Runs a future whose randomness, and that of all it spawns, comes from a seed.
    pub fn scope<F: Future>(seed: u64, work: F) -> impl Future<Output = F::Output> {
        Base::scope(seed, work)
    }
}

impl AsyncRuntime for Seeded {
    type JoinError = <Base as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <Base as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <Base as AsyncRuntime>::Sleep;
    type Instant = <Base as AsyncRuntime>::Instant;
    type TimeoutError = <Base as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <Base as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <Base as AsyncRuntime>::ThreadLocalRng;
    type Mpsc = <Base as AsyncRuntime>::Mpsc;
    type Watch = Fair;
    type Oneshot = <Base as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <Base as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        Base::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        Base::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        Base::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, work: F) -> Self::Timeout<R, F> {
        Base::timeout(duration, work)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        work: F,
    ) -> Self::Timeout<R, F> {
        Base::timeout_at(deadline, work)
    }

    fn is_panic(error: &Self::JoinError) -> bool {
        Base::is_panic(error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        Base::thread_rng()
    }

    fn new(threads: usize) -> Self {
        Seeded(Base::new(threads))
    }

    fn block_on<F: Future<Output = T>, T>(&mut self, work: F) -> T {
        self.0.block_on(work)
    }

    fn spawn_blocking<F, T>(work: F) -> impl Future<Output = Result<T, io::Error>> + Send
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        Base::spawn_blocking(work)
    }
}

/// A watch that wakes in the order in which was waited.
pub struct Fair;

struct Shared<T> {
    value: RwLock<T>,
    version: AtomicU64,
    senders: AtomicUsize,
    receivers: AtomicUsize,
    changed: Notify,
}

/// The side that sets a value.
pub struct FairSender<T>(Arc<Shared<T>>);

/// The side that sees it.
pub struct FairReceiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

impl<T> Clone for FairSender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::SeqCst);
        FairSender(self.0.clone())
    }
}

impl<T> Drop for FairSender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.changed.notify_waiters();
        }
    }
}

impl<T> Clone for FairReceiver<T> {
    fn clone(&self) -> Self {
        self.shared.receivers.fetch_add(1, Ordering::SeqCst);
        FairReceiver { shared: self.shared.clone(), seen: self.seen }
    }
}

impl<T> Drop for FairReceiver<T> {
    fn drop(&mut self) {
        self.shared.receivers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Watch for Fair {
    type Sender<T: OptionalSend + OptionalSync> = FairSender<T>;
    type Receiver<T: OptionalSend + OptionalSync> = FairReceiver<T>;
    type Ref<'a, T: OptionalSend + 'a> = RwLockReadGuard<'a, T>;

    fn channel<T: OptionalSend + OptionalSync>(first: T) -> (FairSender<T>, FairReceiver<T>) {
        let shared = Arc::new(Shared {
            value: RwLock::new(first),
            version: AtomicU64::new(0),
            senders: AtomicUsize::new(1),
            receivers: AtomicUsize::new(1),
            changed: Notify::new(),
        });
        (FairSender(shared.clone()), FairReceiver { shared, seen: 0 })
    }
}

impl<T: OptionalSend + OptionalSync> WatchSender<Fair, T> for FairSender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.receivers.load(Ordering::SeqCst) == 0 {
            return Err(SendError(value));
        }
        self.send_if_modified(|current| {
            *current = value;
            true
        });
        Ok(())
    }

    fn send_if_modified<F: FnOnce(&mut T) -> bool>(&self, modify: F) -> bool {
        let is_modified = modify(&mut self.0.value.write());
        if is_modified {
            self.0.version.fetch_add(1, Ordering::SeqCst);
            self.0.changed.notify_waiters();
        }
        is_modified
    }

    fn borrow_watched(&self) -> RwLockReadGuard<'_, T> {
        self.0.value.read()
    }

    fn subscribe(&self) -> FairReceiver<T> {
        self.0.receivers.fetch_add(1, Ordering::SeqCst);
        FairReceiver { shared: self.0.clone(), seen: self.0.version.load(Ordering::SeqCst) }
    }
}

impl<T: OptionalSend + OptionalSync> WatchReceiver<Fair, T> for FairReceiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        loop {
            let changed = self.shared.changed.notified();
            let version = self.shared.version.load(Ordering::SeqCst);
            if version != self.seen {
                self.seen = version;
                return Ok(());
            }
            if self.shared.senders.load(Ordering::SeqCst) == 0 {
                return Err(RecvError(()));
            }
            changed.await;
        }
    }

    fn borrow_watched(&self) -> RwLockReadGuard<'_, T> {
        self.shared.value.read()
    }

    fn borrow_and_update(&mut self) -> RwLockReadGuard<'_, T> {
        self.seen = self.shared.version.load(Ordering::SeqCst);
        self.shared.value.read()
    }
}

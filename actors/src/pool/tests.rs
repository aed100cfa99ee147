//! A pool of one worker, with a model that never answers to keep it busy.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ractor::rpc::CallResult;
use ractor::{Actor, ActorRef};
use shoal_proto::{Error, ErrorCode, NodeId};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{Kind, Pool, PoolArguments, PoolMessage};
use crate::call::{Call, Reply};
use crate::embed::{Embedders, HttpModel, HttpModelConfig, Model, TextKind};
use crate::parse::ParseLimits;
use crate::work::{Pools, WorkConfig};

const NODE: u64 = 7;

struct Fixture {
    pool: ActorRef<PoolMessage>,
    pools: Pools,
    /// Takes connections and says nothing.
    _silent: TcpListener,
}

impl Fixture {
    async fn start() -> Fixture {
        // The binary does this first thing in main; another test may have been here before.
        drop(rustls::crypto::ring::default_provider().install_default());
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let model = HttpModelConfig {
            name: "silent".into(),
            base_url: format!("http://{}", silent.local_addr().expect("bound")),
            api_key: String::new(),
            dimension: 2,
            max_tokens: 512,
            batch: 2,
            concurrency: 2,
            timeout_seconds: 60,
        };
        let model = Model::Http(Arc::new(HttpModel::new(model).expect("builds")));
        let embedders = Embedders::new(BTreeMap::from([("silent".to_owned(), model)]), None, 0, "");
        let parse_limits = ParseLimits::default();
        let config = WorkConfig { embedders, parse_limits, parsers: 1, embedding: 1 };
        let pools = Pools::default();
        let arguments =
            PoolArguments { kind: Kind::Embedders, node: NodeId(NODE), config, pools: pools.clone() };
        let (pool, _) = Actor::spawn(None, Pool, arguments).await.expect("starts");
        Fixture { pool, pools, _silent: silent }
    }

    /// Asks for a batch by a model, in a task that can be given up.
    fn embed(&self, model: &str, may_wait: bool) -> JoinHandle<Result<Option<Reply>, Error>> {
        let (pools, model) = (self.pools.clone(), model.to_owned());
        let call = Call::Embed { model, kind: TextKind::Passage, texts: vec!["text".into()] };
        tokio::spawn(async move { pools.perform(Kind::Embedders, call, may_wait).await })
    }

    async fn wait_for_room(&self, wanted: u64) {
        let told = async {
            loop {
                let room = self.pool.call(PoolMessage::GetRoom, Some(Duration::from_secs(5))).await;
                match room {
                    Ok(CallResult::Success(node)) if node == wanted => return,
                    Ok(CallResult::Success(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
                    _ => panic!("the pool does not answer"),
                }
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(10), told).await;
        assert!(in_time.is_ok(), "waited 10 s for the pool to tell {wanted}");
    }
}

#[tokio::test]
async fn a_busy_pool_has_no_room_and_goes_on_when_nobody_waits_for_what_it_does() {
    let fixture = Fixture::start().await;
    fixture.wait_for_room(NODE).await;
    let first = fixture.embed("silent", false);
    fixture.wait_for_room(0).await;
    let refused = fixture.embed("silent", false).await.expect("no panic");
    assert!(matches!(refused, Ok(None)));
    let given_up = fixture.embed("silent", true);
    let waiting = fixture.embed("unknown", true);
    first.abort();
    given_up.abort();
    let done = tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("its turn comes");
    let Ok(Ok(Some(Reply::Failed(error)))) = done else { panic!("an unknown model embeds") };
    assert_eq!(error.code, ErrorCode::NotFound);
    fixture.wait_for_room(NODE).await;
    fixture.pool.stop(None);
}

#[tokio::test]
async fn a_worker_that_fails_costs_its_work_and_is_replaced() {
    let fixture = Fixture::start().await;
    let lost = fixture.embed("silent", false);
    fixture.wait_for_room(0).await;
    fixture.pool.get_cell().get_children().iter().for_each(ractor::ActorCell::kill);
    let lost = tokio::time::timeout(Duration::from_secs(10), lost).await.expect("its asker hears of it");
    let Ok(Err(error)) = lost else { panic!("a worker that was killed answers") };
    assert_eq!(error.code, ErrorCode::Internal);
    fixture.wait_for_room(NODE).await;
    fixture.pool.stop(None);
}

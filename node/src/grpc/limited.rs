//! How many calls of a service are in work at once, and for how long. A place is taken before anything
//! of a body is read, because large bodies that wait are what a node would run out of memory by; and it
//! is given back when the time is over, because a body may come as slowly as its sender likes.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Semaphore;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;

/// The method that needs no place: a service that has too much to do is healthy.
const HEALTH_CHECK: &str = "/HealthCheck";

/// A service with so many places.
#[derive(Clone)]
pub(super) struct Limited<S> {
    service: S,
    places: Arc<Semaphore>,
    patience: Duration,
}

impl<S> Limited<S> {
    /// Lets so many calls in at once, each for so long.
    pub(super) fn new(service: S, places: usize, patience: Duration) -> Limited<S> {
        Limited { service, places: Arc::new(Semaphore::new(places)), patience }
    }
}

impl<S> Service<http::Request<Body>> for Limited<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path().ends_with(HEALTH_CHECK) {
            return Box::pin(self.service.call(request));
        }
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            let refusal = Status::resource_exhausted("too many calls are in work; try again after a pause");
            return Box::pin(async move { Ok(refusal.into_http()) });
        };
        let (called, patience) = (self.service.call(request), self.patience);
        Box::pin(async move {
            let answered = tokio::time::timeout(patience, called).await;
            drop(place);
            answered.unwrap_or_else(|_| {
                let late = format!("the call was not done within {} s", patience.as_secs());
                Ok(Status::deadline_exceeded(late).into_http())
            })
        })
    }
}

impl<S: NamedService> NamedService for Limited<S> {
    const NAME: &'static str = S::NAME;
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use tonic::Code;

    /// Takes every call and answers none.
    struct Silent;

    impl Service<http::Request<Body>> for Silent {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<http::Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            std::future::pending()
        }
    }

    fn request(method: &str) -> http::Request<Body> {
        let path = format!("/shoal.parser.v1.DocumentParser/{method}");
        http::Request::builder().uri(path).body(Body::empty()).expect("a request")
    }

    fn code(answered: Result<http::Response<Body>, Infallible>) -> Code {
        let Ok(response) = answered;
        Status::from_header_map(response.headers()).expect("a status").code()
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_place_is_refused_at_once_and_who_has_one_loses_it_in_the_end() {
        let mut service = Limited::new(Silent, 1, Duration::from_secs(300));
        let first = service.call(request("ParseDocument"));
        let refused = service.call(request("ParseStream")).now_or_never().expect("at once");
        assert_eq!(code(refused), Code::ResourceExhausted);
        assert!(service.call(request("HealthCheck")).now_or_never().is_none(), "health needs no place");
        assert_eq!(code(first.await), Code::DeadlineExceeded);
        let given_up = service.call(request("ParseDocument"));
        drop(given_up);
        assert!(service.call(request("ParseDocument")).now_or_never().is_none(), "there is a place again");
    }
}

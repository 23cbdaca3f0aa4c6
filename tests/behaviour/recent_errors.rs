//! The last requests that came to nothing are kept, each with its cause.

use std::time::Duration;

use weir::metrics::{Outcome, RefusedBy};
use weir::recent::{MAX_RECENT, RecentError};

use crate::gateway::{Step, answer, chunk, completion, error, event, stream_head};
use crate::world::{CHAT, STREAM, World, bearer, chat, with};

/// The only one.
#[track_caller]
fn sole(world: &World) -> RecentError {
    let mut recent = world.proxy.recent_errors();
    assert_eq!(recent.len(), 1, "{recent:?}");
    recent.remove(0)
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_kept_with_whose_limit_it_was() {
    let config = "[models.\"gpt-4.1-mini\"]\nrequests = { rate = \"1/h\", burst = 1 }\n[clients.bot]\nkey = \"k\"\n";
    let world = World::new(config, |_| completion());
    assert_eq!(world.send(bearer(chat(CHAT), "k")).await.status, 200);
    let refused = world.send(bearer(chat(CHAT), "k")).await;
    let kept = sole(&world);
    assert_eq!((kept.status, kept.outcome, kept.attempts), (429, Outcome::Refused, 0));
    assert_eq!((kept.refused_by, kept.code), (Some(RefusedBy::Requests), Some("rate_limit_exceeded")));
    assert_eq!(kept.scope.as_deref(), Some("model:gpt-4.1-mini"));
    assert_eq!((&*kept.client, &*kept.model), ("bot", "gpt-4.1-mini"));
    assert_eq!(kept.request_id, refused.header("x-request-id"));
    assert!(refused.text().contains(&kept.message) && !kept.message.is_empty(), "{}", kept.message);
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_cannot_be_reached_is_kept_with_how_often_it_was_tried() {
    let world = World::new("[retry]\nmax_retries = 2\n", |_| completion());
    world.gateway.hang_up_on(9);
    let failed = world.send(with(chat(CHAT), "x-request-id", "mine-1")).await;
    let kept = sole(&world);
    assert_eq!((kept.status, kept.outcome, kept.code), (502, Outcome::Failed, Some("upstream_unreachable")));
    assert_eq!((kept.request_id.as_str(), kept.refused_by), ("mine-1", None));
    assert_eq!(kept.attempts.to_string(), failed.header("x-weir-attempts"));
    assert!(kept.message.starts_with("no answer from the gateway: "), "{}", kept.message);
}

#[tokio::test(start_paused = true)]
async fn of_the_gateways_own_error_the_status_is_kept_and_nothing_of_its_body() {
    let world =
        World::new("[retry]\nmax_retries = 0\n", |_| error(503, &[("x-request-id", "gw-7"), ("retry-after", "9999")]));
    assert_eq!(world.chat().await.status, 503);
    let kept = sole(&world);
    assert_eq!((kept.status, kept.outcome, kept.code), (503, Outcome::UpstreamError, None));
    assert_eq!((kept.request_id.as_str(), kept.message.as_str()), ("gw-7", "the gateway answered 503"));
    assert_eq!(kept.attempts, 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_off_or_brings_an_error_is_kept_though_it_began_well() {
    let world = World::new("", |seen| match seen.number {
        0 => vec![stream_head(), event("one"), Step::Close],
        1 => vec![
            stream_head(),
            event("one"),
            chunk("data: {\"error\":{\"message\":\"said by the gateway\"}}\n\n"),
            Step::Send(b"0\r\n\r\n".to_vec()),
        ],
        _ => vec![stream_head(), event("one"), Step::Stall],
    });
    for (number, (code, words)) in [
        (Some("upstream_disconnected"), "the gateway broke the answer off"),
        (None, "the gateway's stream ended in an error"),
        (Some("idle_timeout"), "the gateway sent nothing more for too long"),
    ]
    .into_iter()
    .enumerate()
    {
        world.send(with(chat(STREAM), "x-request-id", "a")).await;
        let kept = world.proxy.recent_errors();
        assert_eq!(kept.len(), number + 1);
        let newest = &kept[0];
        assert_eq!((newest.status, newest.outcome, newest.code), (200, Outcome::UpstreamError, code));
        assert!(newest.message.starts_with(words) && newest.request_id == "a", "{newest:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_went_well_and_what_the_client_did_wrong_is_not_kept() {
    let world = World::new("", |seen| match seen.number {
        0 => completion(),
        1 => answer(404, &[], "{}"),
        _ => vec![Step::Stall],
    });
    assert_eq!(world.chat().await.status, 200);
    assert_eq!(world.chat().await.status, 404);
    assert_eq!(world.send(chat(r#"{"model":"a","model":"b"}"#)).await.status, 400);
    let leaving = world.spawn(chat(CHAT));
    world.gateway.saw(3).await;
    leaving.abort();
    world.gateway.saw_cancelled(1).await;
    world.settle().await;
    assert_eq!(world.requests("disconnected"), 1.0);
    assert_eq!(world.proxy.recent_errors(), []);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_refusals_leaves_only_the_last() {
    let config = "[limits]\nrequests = { rate = \"1/h\", burst = 1 }\n[queue]\nmax_wait = \"0s\"\n";
    let world = World::new(config, |_| completion());
    for number in 0..MAX_RECENT + 20 {
        tokio::time::advance(Duration::from_millis(1)).await;
        world.send(with(chat(CHAT), "x-request-id", &number.to_string())).await;
    }
    let kept = world.proxy.recent_errors();
    assert_eq!((kept.len(), kept[0].request_id.as_str()), (MAX_RECENT, "119"));
    assert_eq!(kept[MAX_RECENT - 1].request_id, "20");
}

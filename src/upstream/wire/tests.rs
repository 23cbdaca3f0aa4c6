use tokio::io::{AsyncWriteExt as _, DuplexStream};

use super::*;

/// A connection, and the gateway's end of it.
fn connected() -> (Wire, DuplexStream) {
    let (ours, gateways) = tokio::io::duplex(1 << 20);
    (Wire::new(Box::new(ours)), gateways)
}

#[tokio::test]
async fn a_connection_with_bytes_of_its_own_is_never_quiet_again() {
    let (mut wire, mut gateway) = connected();
    assert!(wire.is_quiet());
    gateway.write_all(b"\r\n").await.expect("there is room");
    for look in 0..4 {
        assert!(!wire.is_quiet(), "look {look}");
    }
    assert!(!wire.may_be_reused());
}

#[tokio::test]
async fn a_closed_connection_is_not_quiet_for_a_task_that_has_had_its_turn() {
    let (mut wire, gateway) = connected();
    drop(gateway);
    poll_fn(|cx| {
        while let Poll::Ready(progress) = tokio::task::coop::poll_proceed(cx) {
            progress.made_progress();
        }
        assert!(!wire.is_quiet());
        Poll::Ready(())
    })
    .await;
}

//! A network between weir and the gateway that a test can make slow, one way or both, interrupt and cut. Like TCP it loses
//! no byte of a connection that lasts.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::sync::Notify;
use tokio::time::Instant;

/// One of the two ways of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToGateway,
    ToWeir,
}

impl Way {
    pub const BOTH: [Self; 2] = [Self::ToGateway, Self::ToWeir];
}

/// Of how many connections a cut hits one.
pub const CUT_ONE_OF: usize = 3;

/// Pieces under way on one way of a connection; its sender waits beyond that.
const MOST_UNDER_WAY: usize = 64;

#[derive(Debug, Default)]
pub struct Network {
    weather: Mutex<Weather>,
    /// Wakes in the order of waiting, so that a seed's story stays the same.
    changed: Notify,
}

#[derive(Debug, Clone, Copy, Default)]
struct Weather {
    /// How long bytes take, by [`Way`].
    delays: [Duration; 2],
    /// Which ways are interrupted: what is sent waits.
    interrupted: [bool; 2],
    /// The last cut, and how many there were.
    cut: Option<Cut>,
    cuts: u64,
}

/// Some connections end on one way, and go on on the other.
#[derive(Debug, Clone, Copy)]
struct Cut {
    way: Way,
    /// Which of the connections, by the remainder of their number.
    remainder: usize,
}

impl Network {
    pub fn delay(&self, delays: [Duration; 2]) {
        self.change(|weather| weather.delays = delays);
    }

    /// Holds back what is sent on these ways, from now on; no new connection is made while there are any.
    pub fn interrupt(&self, ways: &[Way]) {
        self.change(|weather| weather.interrupted = Way::BOTH.map(|way| ways.contains(&way)));
    }

    /// Ends one of three connections on one way.
    pub fn cut(&self, way: Way, remainder: usize) {
        self.change(|weather| {
            weather.cut = Some(Cut { way, remainder: remainder % CUT_ONE_OF });
            weather.cuts += 1;
        });
    }

    fn change(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock().expect("no test panics here"));
        self.changed.notify_waiters();
    }

    fn weather(&self) -> Weather {
        *self.weather.lock().expect("no test panics here")
    }

    /// Waits until connections can be made.
    pub async fn is_passable(&self) {
        loop {
            let changed = self.changed.notified();
            if self.weather().interrupted == [false; 2] {
                return;
            }
            changed.await;
        }
    }

    /// Carries a connection's bytes between weir's end and the gateway's, until both ways have ended.
    pub async fn carry(self: Arc<Self>, connection: usize, weir: DuplexStream, gateway: DuplexStream) {
        let (from_weir, to_weir) = tokio::io::split(weir);
        let (from_gateway, to_gateway) = tokio::io::split(gateway);
        tokio::join!(
            self.carry_one_way(Way::ToGateway, connection, from_weir, to_gateway),
            self.carry_one_way(Way::ToWeir, connection, from_gateway, to_weir),
        );
    }

    async fn carry_one_way(
        &self,
        way: Way,
        connection: usize,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) {
        let cuts_before = self.weather().cuts;
        let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut ended = false;
        // What weir gives up is lost with what was on its way; what the gateway has sent still arrives.
        while !ended || (way == Way::ToWeir && !under_way.is_empty()) {
            let changed = self.changed.notified();
            let weather = self.weather();
            let is_hit = |cut: Cut| cut.way == way && connection % CUT_ONE_OF == cut.remainder;
            if weather.cuts > cuts_before && weather.cut.is_some_and(is_hit) {
                break;
            }
            let due = under_way.front().map(|(due, _)| *due).filter(|_| !weather.interrupted[way as usize]);
            let mut piece = Vec::with_capacity(16 << 10);
            tokio::select! {
                biased;
                read = from.read_buf(&mut piece), if !ended && under_way.len() < MOST_UNDER_WAY => {
                    if read.is_ok_and(|read| read > 0) {
                        // Nothing overtakes what was sent before.
                        let due = Instant::now() + weather.delays[way as usize];
                        let due = under_way.back().map_or(due, |(before, _)| due.max(*before));
                        under_way.push_back((due, piece));
                    } else {
                        ended = true;
                    }
                }
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    let (_, piece) = under_way.pop_front().expect("it was under way");
                    if to.write_all(&piece).await.is_err() {
                        break;
                    }
                }
                () = changed => {}
            }
        }
        let _ = to.shutdown().await;
    }
}

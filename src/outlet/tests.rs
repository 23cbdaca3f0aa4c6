use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

/// Whatever takes longer has failed.
const DEADLINE: Duration = Duration::from_secs(30);

/// A sink that does what the test says, write by write.
struct Scripted {
    /// Told of each write; the answer says how many bytes are taken before it fails, or that all are.
    writes: Sender<String>,
    answers: Receiver<Answer>,
}

enum Answer {
    All,
    Only(usize, io::ErrorKind),
}

impl Sink for Scripted {
    fn write(&mut self, lines: &[u8]) -> Result<(), Stopped> {
        self.writes.send(String::from_utf8(lines.to_vec()).expect("text")).expect("the test goes on");
        match self.answers.recv() {
            Ok(Answer::Only(written, kind)) => Err(Stopped { written, error: kind.into() }),
            // The test is over, or content.
            Ok(Answer::All) | Err(_) => Ok(()),
        }
    }
}

/// The test's end of a sink.
struct Script {
    writes: Receiver<String>,
    answers: Sender<Answer>,
}

impl Script {
    fn new() -> (Self, Box<dyn Sink>) {
        let ((told, writes), (answers, given)) = (channel(), channel());
        (Self { writes, answers }, Box::new(Scripted { writes: told, answers: given }))
    }

    /// The next write, which waits for its answer.
    #[track_caller]
    fn comes(&self) -> String {
        self.writes.recv_timeout(DEADLINE).expect("something is written")
    }

    fn answer(&self, answer: Answer) {
        self.answers.send(answer).expect("the thread goes on");
    }
}

fn outlet(sink: Box<dyn Sink>) -> (Outlet, Arc<AtomicU64>) {
    let lost = Arc::<AtomicU64>::default();
    let counter = lost.clone();
    let count = move |lines| {
        counter.fetch_add(lines, Ordering::SeqCst);
    };
    let habits = Habits { name: "the test's log", gather: Duration::ZERO, lost: Box::new(count) };
    (Outlet::start(sink, habits).expect("a thread"), lost)
}

#[test]
fn a_sink_that_hangs_holds_nobody_up_and_what_finds_no_room_is_lost_and_counted() {
    let (script, sink) = Script::new();
    let (outlet, lost) = outlet(sink);
    outlet.push(b"first\n");
    assert_eq!(script.comes(), "first\n");
    // The thread is stuck in that write now.
    let line = [&[b'x'; 1023][..], b"\n"].concat();
    (0..MAX_BUFFERED / 1024 + 10).for_each(|_| outlet.push(&line));
    assert_eq!(lost.load(Ordering::SeqCst), 10);
    assert!(!outlet.flush(Duration::ZERO), "it is not written");
    script.answer(Answer::All);
    assert_eq!(script.comes().len(), MAX_BUFFERED);
    script.answer(Answer::All);
    assert!(outlet.flush(DEADLINE));
    outlet.push(b"again\n");
    assert_eq!(script.comes(), "again\n");
    assert_eq!(lost.load(Ordering::SeqCst), 10);
}

#[test]
fn what_could_not_be_written_is_tried_again_from_the_very_byte() {
    let (script, sink) = Script::new();
    let (outlet, lost) = outlet(sink);
    outlet.push(b"one\ntwo\n");
    assert_eq!(script.comes(), "one\ntwo\n");
    outlet.push(b"three\n");
    script.answer(Answer::Only(5, io::ErrorKind::StorageFull));
    assert_eq!(script.comes(), "wo\n");
    script.answer(Answer::Only(1, io::ErrorKind::WouldBlock));
    assert_eq!(script.comes(), "o\n");
    script.answer(Answer::All);
    assert_eq!(script.comes(), "three\n");
    script.answer(Answer::All);
    assert!(outlet.flush(DEADLINE));
    assert_eq!(lost.load(Ordering::SeqCst), 0);
}

#[test]
fn another_sink_gets_what_the_old_one_did_not_take_in_whole_lines() {
    let (script, sink) = Script::new();
    let (other, other_sink) = Script::new();
    let (outlet, lost) = outlet(sink);
    outlet.push(b"one\ntwo\n");
    script.comes();
    outlet.replace(other_sink);
    script.answer(Answer::Only(6, io::ErrorKind::StorageFull));
    assert_eq!(other.comes(), "two\n");
    other.answer(Answer::All);
    outlet.push(b"three\n");
    assert_eq!(other.comes(), "three\n");
    other.answer(Answer::All);
    assert!(outlet.flush(DEADLINE));
    assert_eq!(lost.load(Ordering::SeqCst), 0);
}

#[test]
fn what_was_pushed_before_another_sink_took_over_goes_to_the_old_one() {
    let (script, sink) = Script::new();
    let (other, other_sink) = Script::new();
    let (outlet, _) = outlet(sink);
    outlet.push(b"one\n");
    script.comes();
    outlet.push(b"two\n");
    outlet.replace(other_sink);
    outlet.push(b"three\n");
    script.answer(Answer::All);
    assert_eq!(script.comes(), "two\n");
    script.answer(Answer::All);
    assert_eq!(other.comes(), "three\n");
    other.answer(Answer::All);
    assert!(outlet.flush(DEADLINE));
}

#[test]
fn with_the_last_of_its_clones_it_writes_what_waits_and_counts_what_it_cannot() {
    let (script, sink) = Script::new();
    let (outlet, lost) = outlet(sink);
    outlet.push(b"one\n");
    script.comes();
    outlet.push(b"two\n");
    let clone = outlet.clone();
    drop(outlet);
    clone.push(b"three\n");
    drop(clone);
    script.answer(Answer::All);
    assert_eq!(script.comes(), "two\nthree\n");
    script.answer(Answer::Only(4, io::ErrorKind::BrokenPipe));
    // The thread is gone when nobody tells of writes any more.
    assert!(script.writes.recv_timeout(DEADLINE).is_err());
    assert_eq!(lost.load(Ordering::SeqCst), 1);
}

#[test]
fn a_file_is_appended_to_and_made_for_its_owner_and_group_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let path = std::env::temp_dir().join(format!("weir-outlet-{}", std::process::id()));
    std::fs::remove_file(&path).ok();
    for line in ["one\n", "two\n"] {
        LogFile::open(&path).expect("it can be made").write(line.as_bytes()).expect("written");
    }
    assert_eq!(std::fs::read_to_string(&path).expect("there"), "one\ntwo\n");
    let mode = std::fs::metadata(&path).expect("there").permissions().mode();
    assert_eq!(mode & 0o137, 0, "{mode:o}");
    std::fs::remove_file(&path).expect("there");
}

#[test]
fn that_lines_are_lost_is_said_at_once_and_then_once_a_minute_with_their_number() {
    let (mut losses, now) = (Losses::default(), Instant::now());
    assert_eq!(losses.due(now), None);
    losses.untold = 3;
    assert_eq!((losses.due(now), losses.due(now)), (Some(3), None));
    losses.untold = 4;
    assert_eq!(losses.due(now + SAID_EVERY / 2), None);
    losses.untold += 1;
    assert_eq!(losses.due(now + SAID_EVERY), Some(5));
}

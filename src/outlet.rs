//! Lines on their way out: handed over by threads that must not wait, written by one that may.
//!
//! A disk can take seconds for a write, and a reader of stderr can stop reading. Neither may hold up a request, so no
//! worker writes: [`Outlet::push`] copies a line behind those that wait already, which takes as long as the copy, and a
//! thread of the outlet's own writes what has gathered. What waits is bounded ([`MAX_BUFFERED`]); a line for which there is
//! no room is lost, and counted. The thread gathers lines for a moment before it writes them, so that under load a worker
//! has to wake it at most twenty times a second.
//!
//! Where a write fails, what it could not write is tried again, from the very byte: a disk that was full for a while has
//! whole lines only.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of lines that wait to be written. As many again may be in the hands of the thread that writes.
pub const MAX_BUFFERED: usize = 4 << 20;

/// From so many on, the thread does not wait for more.
const MANY: usize = MAX_BUFFERED / 4;

/// Room that is kept for the next lines when a burst is over.
const KEPT_ROOM: usize = 64 << 10;

/// Until what could not be written is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The same where the reader is only not ready: a pipe that was set not to block.
const READY_AFTER: Duration = Duration::from_millis(10);

/// How often it is said, at most, that lines are lost.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// Where lines go in the end.
pub trait Sink: Send {
    /// Writes these lines, whole.
    ///
    /// # Errors
    /// What stopped it, and how many bytes were written before.
    fn write(&mut self, lines: &[u8]) -> Result<(), Stopped>;

    /// Begins anew at the same place, if it may have become another: a file that was renamed.
    ///
    /// # Errors
    /// It cannot be opened; the old one stays in use.
    fn reopen(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A write that ended before its end.
#[derive(Debug)]
pub struct Stopped {
    pub written: usize,
    pub error: io::Error,
}

/// The process's stderr. Others that write to it do so between two writes.
#[derive(Debug)]
pub struct Stderr;

impl Sink for Stderr {
    fn write(&mut self, lines: &[u8]) -> Result<(), Stopped> {
        write_all(&mut io::stderr().lock(), lines)
    }
}

/// A file that lines are appended to.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Opens the file, or makes it: read by its owner and group, written by its owner.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: append_to(path)? })
    }
}

impl Sink for LogFile {
    fn write(&mut self, lines: &[u8]) -> Result<(), Stopped> {
        write_all(&mut self.file, lines)
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.file = append_to(&self.path)?;
        Ok(())
    }
}

/// Nothing is written at all.
#[derive(Debug)]
pub struct Nowhere;

impl Sink for Nowhere {
    fn write(&mut self, _: &[u8]) -> Result<(), Stopped> {
        Ok(())
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

/// `Write::write_all`, which tells how far it got.
fn write_all(out: &mut impl Write, lines: &[u8]) -> Result<(), Stopped> {
    let mut written = 0;
    while written < lines.len() {
        match out.write(&lines[written..]) {
            Ok(0) => return Err(Stopped { written, error: io::ErrorKind::WriteZero.into() }),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Stopped { written, error }),
        }
    }
    Ok(())
}

/// How an outlet behaves.
pub struct Habits {
    /// What it is called in weir's own log.
    pub name: &'static str,
    /// For how long lines gather before they are written.
    pub gather: Duration,
    /// Told of every line that is lost, by the thread that loses it.
    pub lost: Box<dyn Fn(u64) + Send + Sync>,
}

/// The way to a sink. Clones lead to the same; with the last, what waits is still written, and the thread ends.
#[derive(Clone)]
pub struct Outlet {
    ends: Arc<Ends>,
}

/// Ends the thread when it is dropped.
struct Ends {
    shared: Arc<Shared>,
}

struct Shared {
    habits: Habits,
    /// Held for a copy of a line, or for handing all of them over.
    waiting: Mutex<Waiting>,
    /// There is something to do for the thread.
    work: Condvar,
    /// Something was written.
    progress: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Bytes ever taken in, and of these, those that are written or lost for good.
    accepted: u64,
    done: u64,
    /// The thread sleeps until it is woken.
    parked: bool,
    /// Nobody wants the thread to wait for more lines.
    urgent: bool,
    reopen: bool,
    /// The next sink, and how many bytes of `lines` are still for the last.
    replace: Option<(Box<dyn Sink>, usize)>,
    closing: bool,
    losses: Losses,
}

/// Lines that were lost and not told of yet.
#[derive(Default)]
struct Losses {
    untold: u64,
    told: Option<Instant>,
}

impl Losses {
    /// How many are to be told of now.
    fn due(&mut self, now: Instant) -> Option<u64> {
        let waits = self.told.is_some_and(|told| now.saturating_duration_since(told) < SAID_EVERY);
        if self.untold == 0 || waits {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

impl Outlet {
    /// An outlet to this sink, and its thread.
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn start(sink: Box<dyn Sink>, habits: Habits) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { habits, waiting: Mutex::default(), work: Condvar::new(), progress: Condvar::new() });
        let writer = Writer { shared: shared.clone(), sink, lines: Vec::new(), written: 0, failing: false };
        std::thread::Builder::new().name("log".to_owned()).spawn(move || writer.run())?;
        Ok(Self { ends: Arc::new(Ends { shared }) })
    }

    /// Hands a line over, its line break included. Never waits for the sink; where there is no room the line is lost.
    pub fn push(&self, line: &[u8]) {
        let shared = &self.ends.shared;
        let mut waiting = shared.lock();
        if waiting.lines.len() + line.len() > MAX_BUFFERED {
            waiting.losses.untold += 1;
            let due = waiting.losses.due(Instant::now());
            drop(waiting);
            (shared.habits.lost)(1);
            return shared.tell_losses(due);
        }
        waiting.lines.extend_from_slice(line);
        waiting.accepted += line.len() as u64;
        let many = waiting.lines.len() >= MANY && !waiting.urgent;
        waiting.urgent |= many;
        // Woken after the lock is free.
        let wakes = std::mem::take(&mut waiting.parked) || many;
        drop(waiting);
        if wakes {
            shared.work.notify_one();
        }
    }

    /// Begins a new file under the same path, before any line that is pushed from now on is written. Returns at once.
    pub fn reopen(&self) {
        self.order(|waiting| waiting.reopen = true);
    }

    /// Goes on with another sink for all that is pushed from now on, and for what the old one does not take. Returns at
    /// once.
    pub fn replace(&self, sink: Box<dyn Sink>) {
        self.order(|waiting| {
            let of_the_last = waiting.replace.as_ref().map_or(waiting.lines.len(), |(_, bytes)| *bytes);
            waiting.replace = Some((sink, of_the_last));
        });
    }

    /// Waits until all that was pushed before is written, but no longer than this. Returns whether it is.
    pub fn flush(&self, limit: Duration) -> bool {
        let shared = &self.ends.shared;
        let until = shared.lock().accepted;
        self.order(|waiting| waiting.urgent = true);
        let not_yet = |waiting: &mut Waiting| waiting.done < until;
        let waited = shared.progress.wait_timeout_while(shared.lock(), limit, not_yet);
        let (waiting, _) = waited.unwrap_or_else(PoisonError::into_inner);
        waiting.done >= until
    }

    fn order(&self, give: impl FnOnce(&mut Waiting)) {
        self.ends.shared.order(give);
    }
}

/// Lines of weir's own log; each comes in one piece.
impl Write for Outlet {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.shared.order(|waiting| waiting.closing = true);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, give: impl FnOnce(&mut Waiting)) {
        let mut waiting = self.lock();
        give(&mut waiting);
        waiting.parked = false;
        drop(waiting);
        self.work.notify_one();
    }

    /// Says so, if it is time to. No lock may be held: this may come back as a line to push.
    fn tell_losses(&self, due: Option<u64>) {
        if let Some(lines) = due {
            tracing::warn!(
                lines,
                "lines of {} were lost: what it is written to is too slow, or full",
                self.habits.name
            );
        }
    }
}

/// What the thread is asked to do, besides writing.
struct Orders {
    reopen: bool,
    replace: Option<(Box<dyn Sink>, usize)>,
    closing: bool,
    losses_due: Option<u64>,
}

/// The thread that writes.
struct Writer {
    shared: Arc<Shared>,
    sink: Box<dyn Sink>,
    /// What it has taken over, and how much of that is written.
    lines: Vec<u8>,
    written: usize,
    /// The last write has failed, and it was said.
    failing: bool,
}

impl Writer {
    fn run(mut self) {
        let mut pause = None;
        loop {
            let Orders { reopen, replace, closing, losses_due } = self.next(pause);
            self.shared.tell_losses(losses_due);
            if reopen {
                self.reopen();
            }
            if let Some((sink, of_the_last)) = replace {
                self.write(of_the_last);
                self.sink = sink;
                self.rewind();
                self.failing = false;
            }
            pause = self.write(self.lines.len());
            if closing {
                return self.give_up();
            }
        }
    }

    /// Waits until there is something to do, and takes it over. After a failed write that is the same again, after `pause`.
    fn next(&mut self, pause: Option<Duration>) -> Orders {
        let shared = self.shared.clone();
        let mut waiting = shared.lock();
        let commanded = |waiting: &Waiting| waiting.reopen || waiting.replace.is_some() || waiting.closing;
        if pause.is_none() {
            waiting = self.park(waiting, |waiting| waiting.lines.is_empty() && !waiting.urgent && !commanded(waiting));
        }
        let (limit, hurries) = (pause.unwrap_or(shared.habits.gather), pause.is_none());
        let wait = |waiting: &mut Waiting| !(commanded(waiting) || hurries && waiting.urgent);
        let (waiting, _) = shared.work.wait_timeout_while(waiting, limit, wait).unwrap_or_else(PoisonError::into_inner);
        self.take(waiting)
    }

    /// Sleeps for as long as this holds, until a push or an order wakes it.
    fn park<'w>(
        &self,
        mut waiting: MutexGuard<'w, Waiting>,
        idle: impl Fn(&Waiting) -> bool,
    ) -> MutexGuard<'w, Waiting> {
        while idle(&waiting) {
            waiting.parked = true;
            waiting = self.shared.work.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            waiting.parked = false;
        }
        waiting
    }

    fn take(&mut self, mut waiting: MutexGuard<'_, Waiting>) -> Orders {
        if self.lines.is_empty() {
            std::mem::swap(&mut self.lines, &mut waiting.lines);
        } else if let Some((_, of_the_last)) = &mut waiting.replace {
            // It has refused what came before these.
            *of_the_last = 0;
        }
        waiting.urgent = false;
        Orders {
            reopen: std::mem::take(&mut waiting.reopen),
            replace: waiting.replace.take(),
            closing: waiting.closing,
            losses_due: waiting.losses.due(Instant::now()),
        }
    }

    /// Writes what it has, up to there. Returns after what time to try the rest again, if there is one.
    fn write(&mut self, end: usize) -> Option<Duration> {
        let lines = self.lines.get(self.written..end).filter(|lines| !lines.is_empty())?;
        let ended = self.sink.write(lines);
        let written = ended.as_ref().map_or_else(|stopped| stopped.written, |()| lines.len());
        self.written += written;
        self.shared.lock().done += written as u64;
        self.shared.progress.notify_all();
        match ended {
            Ok(()) => {
                if self.written == self.lines.len() {
                    self.lines.clear();
                    self.lines.shrink_to(KEPT_ROOM);
                    self.written = 0;
                }
                if std::mem::take(&mut self.failing) {
                    tracing::info!("{} is written again", self.shared.habits.name);
                }
                None
            }
            Err(Stopped { error, .. }) if error.kind() == io::ErrorKind::WouldBlock => Some(READY_AFTER),
            Err(Stopped { error, .. }) => {
                if !std::mem::replace(&mut self.failing, true) {
                    let name = self.shared.habits.name;
                    tracing::error!(%error, "{name} cannot be written: its lines wait, 8 MiB of them, then are lost");
                }
                Some(RETRY_AFTER)
            }
        }
    }

    fn reopen(&mut self) {
        let name = self.shared.habits.name;
        match self.sink.reopen() {
            Ok(()) => {
                self.rewind();
                tracing::info!("{name} was opened anew");
            }
            Err(error) => tracing::error!(%error, "{name} cannot be opened anew; it goes on where it was"),
        }
    }

    /// A line of which only a part was written is written whole to the new sink.
    fn rewind(&mut self) {
        let begins = self.lines[..self.written].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let again = self.written - begins;
        self.shared.lock().done -= again as u64;
        self.written = begins;
    }

    /// The end: what is not written now never will be.
    fn give_up(mut self) {
        if self.lines.is_empty() {
            std::mem::swap(&mut self.lines, &mut self.shared.lock().lines);
            self.write(self.lines.len());
        }
        let mut lost = self.lines[self.written..].iter().filter(|byte| **byte == b'\n').count();
        if !self.lines.is_empty() {
            lost += self.shared.lock().lines.iter().filter(|byte| **byte == b'\n').count();
        }
        if lost > 0 {
            (self.shared.habits.lost)(lost as u64);
        }
    }
}

#[cfg(test)]
mod tests;

//! What another process has used, as Linux tells it.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use crate::arguments::Failure;

/// A process under measurement, its children (nginx's workers) included.
pub struct Process {
    pids: Vec<u32>,
}

/// Time on the CPU of each thread so far.
pub struct CpuTime(HashMap<String, Duration>);

impl Process {
    pub fn new(pid: u32) -> Result<Self, Failure> {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let children = children.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>()?;
        Ok(Self { pids: [vec![pid], children].concat() })
    }

    /// User and system time, to the nanosecond (`/proc/PID/stat` would count in hundredths of a second).
    pub fn cpu_time(&self) -> Result<CpuTime, Failure> {
        let mut threads = HashMap::new();
        for pid in &self.pids {
            for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
                let path = thread?.path();
                // A thread may end while we look; what it used is then lost to us, and little.
                let Ok(line) = fs::read_to_string(path.join("schedstat")) else { continue };
                let nanoseconds = line.split_whitespace().next().unwrap_or("0").parse()?;
                threads.insert(path.display().to_string(), Duration::from_nanos(nanoseconds));
            }
        }
        Ok(CpuTime(threads))
    }

    pub fn resident_bytes(&self) -> Result<u64, Failure> {
        self.status_bytes("VmRSS:")
    }

    pub fn peak_resident_bytes(&self) -> Result<u64, Failure> {
        self.status_bytes("VmHWM:")
    }

    fn status_bytes(&self, field: &str) -> Result<u64, Failure> {
        let mut sum = 0;
        for pid in &self.pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix(field)).ok_or("the process has ended")?;
            sum += line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024;
        }
        Ok(sum)
    }
}

impl CpuTime {
    pub fn since(&self, earlier: &Self) -> Duration {
        let used =
            |(thread, time): (_, &Duration)| time.saturating_sub(earlier.0.get(thread).copied().unwrap_or_default());
        self.0.iter().map(used).sum()
    }
}

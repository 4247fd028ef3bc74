//! fio with its nbd engine, and `qemu-img bench`: one short measurement each.

use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::{
    process::{Builder, Process},
    reaper,
};

/// Beyond its run time: opening, laying out, writing its report on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// One fio run. All URIs are loaded at once, by one job each.
#[derive(Clone, Debug)]
pub struct Job {
    pub uris: Vec<String>,
    /// fio's `rw`: "randread", "randwrite", "write:4092k", "randtrim".
    pub pattern: String,
    pub block_bytes: u64,
    pub depth: u32,
    pub seconds: f64,
    /// Further options, as `name=value`.
    pub extra: Vec<String>,
}

/// What one run measured, over all its jobs and both directions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    pub per_second: f64,
    pub bytes_per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub p999_ms: f64,
    pub max_ms: f64,
    pub operations: f64,
    pub seconds: f64,
}

impl Job {
    pub fn new(uri: &str, pattern: &str, block_bytes: u64, depth: u32, seconds: f64) -> Job {
        let (uris, pattern) = (vec![uri.to_owned()], pattern.to_owned());
        Job { uris, pattern, block_bytes, depth, seconds, extra: Vec::new() }
    }
    pub fn with(mut self, option: impl Into<String>) -> Job {
        self.extra.push(option.into());
        self
    }

    /// Starts it in the background.
    pub fn start(&self) -> anyhow::Result<Running> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("fio-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let output = reaper::run_folder().join(format!("{name}.json"));
        let log = reaper::run_folder().join("fio.log");
        let mut builder = Builder::new(&name, "fio", log).args([
            "--ioengine=nbd",
            "--output-format=json",
            "--group_reporting=1",
            "--thread=1",
            "--randrepeat=0",
            "--percentile_list=50:99:99.9",
        ]);
        builder = builder.current_dir(reaper::run_folder()).arg(format!("--output={}", output.display())).args([
            format!("--rw={}", self.pattern),
            format!("--bs={}", self.block_bytes),
            format!("--iodepth={}", self.depth),
        ]);
        if self.seconds > 0.0 {
            builder = builder.arg("--time_based=1").arg(format!("--runtime={}ms", (self.seconds * 1000.0) as u64));
        }
        builder = builder.args(self.extra.iter().map(|option| format!("--{option}")));
        for (number, uri) in self.uris.iter().enumerate() {
            builder = builder.arg(format!("--name=job{number}")).arg(format!("--uri={uri}"));
        }
        Ok(Running { process: builder.spawn()?, output, seconds: self.seconds })
    }

    pub fn run(&self) -> anyhow::Result<Measured> {
        self.start()?.finish()
    }
}

/// fio at work. Ended when dropped.
pub struct Running {
    process: Process,
    output: PathBuf,
    seconds: f64,
}

impl Running {
    pub fn finish(mut self) -> anyhow::Result<Measured> {
        // Without a run time the amount of data ends it; nobody here asks for more than some minutes.
        let limit = if self.seconds > 0.0 { self.seconds } else { 600.0 };
        let status = self.process.wait(Duration::from_secs_f64(limit) + PATIENCE)?;
        ensure!(status.success(), "fio: {status}: {}", self.process.tail());
        let text = std::fs::read_to_string(&self.output)?;
        let _ = std::fs::remove_file(&self.output);
        // Warnings may come before the object.
        let begin = text.find('{').context("fio wrote no JSON")?;
        let report: Value = serde_json::from_str(&text[begin..])?;
        let job = report["jobs"].get(0).context("fio reports no job")?;
        ensure!(job["error"].as_i64() == Some(0), "fio: error {}", job["error"]);
        Ok(read(job))
    }
}

fn read(job: &Value) -> Measured {
    let mut sum = Measured::default();
    for direction in ["read", "write", "trim"] {
        let part = &job[direction];
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        if number(&part["total_ios"]) == 0.0 {
            continue;
        }
        let percentile = |name: &str| number(&part["clat_ns"]["percentile"][name]) / 1e6;
        sum.per_second += number(&part["iops"]);
        sum.bytes_per_second += number(&part["bw_bytes"]);
        sum.operations += number(&part["total_ios"]);
        sum.seconds = sum.seconds.max(number(&part["runtime"]) / 1000.0);
        sum.p50_ms = sum.p50_ms.max(percentile("50.000000"));
        sum.p99_ms = sum.p99_ms.max(percentile("99.000000"));
        sum.p999_ms = sum.p999_ms.max(percentile("99.900000"));
        sum.max_ms = sum.max_ms.max(number(&part["clat_ns"]["max"]) / 1e6);
    }
    sum
}

/// `qemu-img bench`: requests per second.
pub fn qemu_img_bench(uri: &str, write: bool, block_bytes: u64, depth: u32, count: u64) -> anyhow::Result<f64> {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-f", "raw", "-c", &count.to_string(), "-d", &depth.to_string()]);
    command.args(["-s", &block_bytes.to_string()]);
    if write {
        command.arg("-w");
    }
    let output = command.arg(uri).output().context("qemu-img (package qemu-utils)")?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("qemu-img bench: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let seconds = said.split("completed in ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let seconds: f64 = seconds.context("qemu-img bench says no time")?.parse()?;
    Ok(count as f64 / seconds)
}

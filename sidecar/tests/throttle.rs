//! The throttle with real time: rates hold, changes reach those who wait, a dropped wait takes nothing.

#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use watari_sidecar::throttle::{Limit, Throttle};

#[tokio::test]
async fn several_streams_share_one_rate() {
    // 40 Mbit/s for one second is 5 MB.
    let throttle = Arc::new(Throttle::new(Limit::BitsPerSecond(40_000_000)));
    let passed = Arc::new(AtomicU64::new(0));
    let streams: Vec<_> = (0..4)
        .map(|_| {
            let (throttle, passed) = (throttle.clone(), passed.clone());
            tokio::spawn(async move {
                loop {
                    throttle.acquire(65_536).await;
                    passed.fetch_add(65_536, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let begin = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (bytes, seconds) = (passed.load(Ordering::Relaxed) as f64, begin.elapsed().as_secs_f64());
    streams.iter().for_each(|stream| stream.abort());
    // The burst and one frame may come on top; a busy machine may only make it less.
    assert!(bytes <= 5e6 * seconds + 250_000.0 + 65_536.0, "{bytes} in {seconds} s");
    assert!(bytes >= 5e6 * seconds * 0.7, "{bytes} in {seconds} s");
}

#[tokio::test]
async fn a_new_limit_wakes_those_who_wait() {
    let throttle = Arc::new(Throttle::new(Limit::BitsPerSecond(8_000)));
    throttle.acquire(1_000_000).await;
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let throttle = throttle.clone();
            tokio::spawn(async move { throttle.acquire(1).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "1000 s of debt");
    let begin = Instant::now();
    throttle.set_limit(Limit::Unlimited);
    for waiter in waiters {
        waiter.await.unwrap();
    }
    assert!(begin.elapsed() < Duration::from_millis(900), "not by polling: {:?}", begin.elapsed());
    assert_eq!(throttle.limit(), Limit::Unlimited);
}

#[test]
fn a_blocking_waiter_is_woken_too() {
    let throttle = Arc::new(Throttle::new(Limit::Paused));
    let waiter = std::thread::spawn({
        let throttle = throttle.clone();
        move || throttle.acquire_blocking(4096)
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiter.is_finished());
    let begin = Instant::now();
    throttle.set_limit(Limit::BitsPerSecond(1_000_000));
    waiter.join().unwrap();
    assert!(begin.elapsed() < Duration::from_millis(900), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_dropped_wait_takes_nothing_and_holds_nobody_up() {
    let throttle = Throttle::new(Limit::Paused);
    for _ in 0..10 {
        assert!(tokio::time::timeout(Duration::from_millis(5), throttle.acquire(u64::MAX / 16)).await.is_err());
    }
    throttle.set_limit(Limit::BitsPerSecond(8_000));
    let begin = Instant::now();
    throttle.acquire(1).await;
    assert!(begin.elapsed() < Duration::from_secs(1), "none of the dropped waits left a debt");
}

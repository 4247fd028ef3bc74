//! Pods of one cluster reach those of the other by their own addresses, over the line between the clusters.

use std::time::Duration;

use anyhow::{Context, ensure};

use crate::scene::{play, until};

/// Sent over the line.
const PAYLOAD_MIB: u64 = 4;
/// What a busy machine adds to a round trip.
const SLACK: Duration = Duration::from_millis(60);

/// The average in BusyBox's `round-trip min/avg/max = 170.5/171.3/172.7 ms`.
fn round_trip(ping: &str) -> anyhow::Result<Duration> {
    let figures = ping.lines().find_map(|line| line.split_once(" = ")).context("ping prints a summary")?.1;
    let average = figures.split('/').nth(1).context("the average is the second figure")?;
    Ok(Duration::from_secs_f64(average.parse::<f64>()? / 1000.0))
}

#[tokio::test]
async fn pods_of_the_two_clusters_talk_over_the_wan_with_its_round_trip() -> anyhow::Result<()> {
    play("wan", |scene| async move {
        let (a, b) = (&scene.pair.a, &scene.pair.b);
        let serve = format!(
            "dd if=/dev/urandom of=/tmp/file bs=1M count={PAYLOAD_MIB} 2>/dev/null; nc -ll -p 8080 -e cat /tmp/file"
        );
        scene.pod(b, "server", &serve, &[]).await?;
        let address = scene.running(b, "server").await?;
        let before = scene.pair.ours.as_ref().map(|ours| ours.link("stats")).transpose()?;

        let fetch = format!("nc -w 60 {address} 8080 | wc -c");
        scene.pod(a, "client", &fetch, &[]).await?;
        let fetched: u64 = scene.output(a, "client").await?.trim().parse()?;
        ensure!(fetched == PAYLOAD_MIB << 20, "{fetched} bytes arrived");
        scene.pod(a, "ping", &format!("ping -c 5 -w 30 {address}"), &[]).await?;
        let measured = round_trip(&scene.output(a, "ping").await?)?;

        if let (Some(before), Some(ours)) = (before, &scene.pair.ours) {
            let after = ours.link("stats")?;
            let crossed = after.b_to_a.counters.delivered_bytes - before.b_to_a.counters.delivered_bytes;
            ensure!(
                crossed > fetched,
                "{crossed} bytes crossed the line, {fetched} were fetched: there is another way"
            );
            let set = after.a_to_b.shape.delay + after.b_to_a.shape.delay;
            ensure!(measured >= set && measured < set + SLACK, "{measured:?} there and back, the line has {set:?}");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_cut_line_stops_the_traffic_and_a_restored_one_carries_it_again() -> anyhow::Result<()> {
    play("cut", |scene| async move {
        let Some(ours) = scene.pair.ours.clone() else {
            eprintln!("skipped: the line between other people's clusters is not ours to cut");
            return Ok(());
        };
        let (a, b) = (&scene.pair.a, &scene.pair.b);
        scene.pod(b, "server", "nc -ll -p 8080 -e echo reached", &[]).await?;
        let address = scene.running(b, "server").await?;
        let fetch = format!("nc -w 3 {address} 8080 2>/dev/null || echo cut off");
        ours.link("cut")?;
        let result = async {
            scene.pod(a, "during", &fetch, &[]).await?;
            let during = scene.output(a, "during").await?;
            ensure!(during.trim() == "cut off", "with a cut line: {during}");
            Ok(())
        }
        .await;
        // Also when that failed: the next test needs the line.
        ours.link("restore")?;
        result?;
        let mut attempt = 0;
        until("the line to carry again", Duration::from_secs(60), || {
            attempt += 1;
            let (scene, fetch) = (&scene, &fetch);
            async move {
                let name = format!("after-{attempt}");
                scene.pod(a, &name, fetch, &[]).await?;
                Ok((scene.output(a, &name).await?.trim() == "reached").then_some(()))
            }
        })
        .await
    })
    .await
}

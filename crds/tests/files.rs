//! What lies in the tree beside the code: the chart's definitions, the document of conditions, and the samples.

use std::path::Path;

use watari_crds::{generate, pair::SyncPair, peer::PeerCluster, replica::SyncReplica};

fn here(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn what_is_generated_from_the_code_is_current() -> anyhow::Result<()> {
    for (path, expected) in generate::files()? {
        let file = here("..").join(path);
        let found = std::fs::read_to_string(&file).unwrap_or_default();
        let remedy = "run `cargo run --bin crdgen`";
        // Both are pages long.
        assert!(found == expected, "{} is stale: {remedy}", file.display());
    }
    Ok(())
}

#[test]
fn every_sample_is_read_and_no_field_of_it_is_lost() -> anyhow::Result<()> {
    let mut seen = 0;
    for entry in std::fs::read_dir(here("samples"))? {
        let text = std::fs::read_to_string(entry?.path())?;
        let written: serde_json::Value = serde_saphyr::from_str(&text)?;
        let read = match written["kind"].as_str() {
            Some("PeerCluster") => serde_json::to_value(serde_saphyr::from_str::<PeerCluster>(&text)?)?,
            Some("SyncPair") => serde_json::to_value(serde_saphyr::from_str::<SyncPair>(&text)?)?,
            Some("SyncReplica") => serde_json::to_value(serde_saphyr::from_str::<SyncReplica>(&text)?)?,
            other => anyhow::bail!("a sample of kind {other:?}"),
        };
        lost("", &written, &read);
        seen += 1;
    }
    assert!(seen >= 4, "{seen} samples");
    Ok(())
}

/// Panics at a value that was written and is not in what was read, except a `false` that is the default.
fn lost(place: &str, written: &serde_json::Value, read: &serde_json::Value) {
    match written {
        serde_json::Value::Object(fields) => {
            for (key, value) in fields {
                lost(&format!("{place}.{key}"), value, &read[key]);
            }
        }
        serde_json::Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                lost(&format!("{place}[{index}]"), value, &read[index]);
            }
        }
        serde_json::Value::Bool(false) if read.is_null() => {}
        // 24h is written back as 86400s.
        value => match (duration(value), duration(read)) {
            (Some(written), Some(read)) => assert_eq!(written, read, "{place}"),
            _ => assert_eq!(value, read, "{place}"),
        },
    }
}

fn duration(value: &serde_json::Value) -> Option<kube::core::Duration> {
    value.as_str()?.parse().ok()
}

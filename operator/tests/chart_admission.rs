//! The chart's admission objects are those of the code (`webhooks::objects`), so that the two cannot differ.

use watari_operator::webhooks::objects::{Endpoint, claims_policies, configurations};

const HEADER: &str = "# Written by `WATARI_WRITE=1 cargo test -p watari-operator --test chart_admission` from operator/src/webhooks/objects.rs.
# The webhooks fail closed and see objects with the label of a pair only. Whom to trust (caBundle) is brought by the operator, as a
# field of its own: leave it to be.
";

#[test]
fn the_charts_admission_objects_are_those_of_the_code() -> anyhow::Result<()> {
    let endpoint = Endpoint::Service { namespace: "{{ .Release.Namespace }}".to_owned() };
    let objects = configurations(&endpoint, None).into_iter().chain(claims_policies());
    let documents: Vec<String> = objects.map(|object| serde_saphyr::to_string(&object)).collect::<Result<_, _>>()?;
    let documents: Vec<&str> = documents.iter().map(|text| text.trim_start_matches("---\n").trim_end()).collect();
    let expected = format!("{HEADER}{}\n", documents.join("\n---\n"));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/watari/templates/admission.yaml");
    if std::env::var_os("WATARI_WRITE").is_some() {
        std::fs::write(file, &expected)?;
    }
    let found = std::fs::read_to_string(file).unwrap_or_default();
    assert!(found == expected, "{file} is stale; its first line says what writes it");
    Ok(())
}

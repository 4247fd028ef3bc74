//! Trust between the two sites' KubeVirt installations: what one lacks of the other's authorities. Pure.
//!
//! virt-operator takes up what lies in the ConfigMap `kubevirt-external-ca` and empties it again; what it trusts stands in `kubevirt-ca`
//! (`pkg/virt-operator/resource/apply/core.go`). It may drop a peer's authority at any time, so this is looked at again and again while a VM
//! crosses.

/// ConfigMap with what this site's KubeVirt trusts.
pub const BUNDLE: &str = "kubevirt-ca";
/// ConfigMap from which it takes up further authorities.
pub const INBOX: &str = "kubevirt-external-ca";
/// Key in both.
pub const KEY: &str = "ca-bundle";

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Certificates of `theirs` that are not in `ours`; `None`: there is nothing to bring.
pub fn missing(ours: &str, theirs: &str) -> Option<String> {
    let known: Vec<String> = certificates(ours).collect();
    let missing: Vec<String> = certificates(theirs).filter(|it| !known.contains(it)).collect();
    (!missing.is_empty()).then(|| missing.join("\n") + "\n")
}

/// Each certificate with its lines as they are, whatever stands between them.
fn certificates(bundle: &str) -> impl Iterator<Item = String> + '_ {
    bundle.split(BEGIN).skip(1).filter_map(|rest| {
        let body = rest.split(END).next()?;
        let lines: Vec<&str> = body.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        Some(format!("{BEGIN}\n{}\n{END}", lines.join("\n")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(body: &str) -> String {
        format!("{BEGIN}\n{body}\n{END}\n")
    }

    #[test]
    fn only_what_is_not_known_is_brought_however_it_is_laid_out() {
        let (a, b) = (certificate("AAAA"), certificate("BBBB"));
        assert_eq!(missing(&a, &format!("\n\n{a}# a comment\n{b}")), Some(b.clone()));
        assert_eq!(missing(&format!("{b}\r\n{a}"), &format!("{a}{b}")), None);
        assert_eq!(missing(&a, ""), None);
    }
}

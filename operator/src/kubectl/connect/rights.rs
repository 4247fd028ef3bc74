//! What a site grants a peer, as server-side apply bodies: exactly what the chart makes of its value `peers`
//! (`charts/watari/templates/peers.yaml`; a test compares the rules).

use serde_json::{Value, json};
use watari_crds::names::{self, label};

/// Name of everything through which the peer `site` is let in: ServiceAccount, token Secret, Role, RoleBinding.
pub fn account(site: &str) -> String {
    format!("watari-peer-{site}")
}

/// Name of the Role and its binding in each namespace that the peer may use.
pub fn replicas_role(site: &str) -> String {
    format!("{}-replicas", account(site))
}

fn labels() -> Value {
    json!({ label::MANAGED: names::MANAGED_BY, "app.kubernetes.io/part-of": "watari" })
}

/// Of the ServiceAccount and its token; `namespace` is the operator's.
pub fn account_objects(site: &str, namespace: &str) -> [Value; 2] {
    let name = account(site);
    let account = json!({
        "apiVersion": "v1", "kind": "ServiceAccount", "automountServiceAccountToken": false,
        "metadata": { "name": name, "namespace": namespace, "labels": labels() },
    });
    let token = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
        "metadata": {
            "name": name, "namespace": namespace, "labels": labels(),
            "annotations": { "kubernetes.io/service-account.name": name },
        },
    });
    [account, token]
}

/// Reading the site card, in the operator's namespace.
pub fn card_rules(site: &str, namespace: &str) -> [Value; 2] {
    let rule = json!({ "apiGroups": [""], "resources": ["configmaps"], "resourceNames": [names::SITE_CARD], "verbs": ["get"] });
    granted(&account(site), namespace, &rule, site, namespace)
}

/// SyncReplicas in `namespace`, for the account in the operator's namespace.
pub fn replica_rules(site: &str, namespace: &str, operator_namespace: &str) -> [Value; 2] {
    let rule = json!({
        "apiGroups": [names::GROUP], "resources": ["syncreplicas"], "verbs": ["get", "create", "patch", "delete"],
    });
    granted(&replicas_role(site), namespace, &rule, site, operator_namespace)
}

fn granted(name: &str, namespace: &str, rule: &Value, site: &str, account_namespace: &str) -> [Value; 2] {
    let api = "rbac.authorization.k8s.io";
    let metadata = json!({ "name": name, "namespace": namespace, "labels": labels() });
    let role = json!({ "apiVersion": format!("{api}/v1"), "kind": "Role", "metadata": metadata, "rules": [rule] });
    let binding = json!({
        "apiVersion": format!("{api}/v1"), "kind": "RoleBinding", "metadata": metadata,
        "roleRef": { "apiGroup": api, "kind": "Role", "name": name },
        "subjects": [{ "kind": "ServiceAccount", "name": account(site), "namespace": account_namespace }],
    });
    [role, binding]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// The rules of each Role in the template: they are written out there, without any value.
    fn of_the_chart() -> Vec<Value> {
        let text = include_str!("../../../../charts/watari/templates/peers.yaml");
        let rules = text.split("\nrules:\n").skip(1).map(|rest| rest.split("---").next().unwrap());
        rules.map(|rules| serde_saphyr::from_str(rules).unwrap()).collect()
    }

    #[test]
    fn connect_grants_what_the_chart_grants() {
        let [card, _] = card_rules("tokyo", "watari-system");
        let [replicas, _] = replica_rules("tokyo", "shop", "watari-system");
        assert_eq!(of_the_chart(), [card["rules"].clone(), replicas["rules"].clone()]);
    }
}

//! `isthmusctl role-binding`: who may do what.

use std::io::Write;

use serde_json::{Value, json};

use crate::{
    Verdict,
    args::{Format, Role, RoleBindingCommand, SetRoleBinding},
    client::Client,
    output,
    shapes::{Deleted, RoleBinding},
    table::Table,
};

pub(super) async fn run(client: &Client, command: RoleBindingCommand, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    match command {
        RoleBindingCommand::Set(args) => {
            let path = format!("role-bindings/{}", args.name);
            let set: RoleBinding = client.put(&path, &body(&args), args.resource_version).await?;
            writeln!(out, "{} set, version {}", set.name, set.resource_version)?;
        }
        RoleBindingCommand::List(args) => {
            let raw: Value = client.get("role-bindings").await?;
            match args.output {
                Format::Json => output::json(out, &raw)?,
                Format::Yaml => output::yaml(out, &raw)?,
                Format::Table => write!(out, "{}", list(&serde_json::from_value::<Vec<RoleBinding>>(raw)?))?,
            }
        }
        RoleBindingCommand::Delete { name } => {
            let deleted: Deleted = client.delete(&format!("role-bindings/{name}")).await?;
            writeln!(out, "{} deleted", deleted.deleted)?;
        }
    }
    Ok(Verdict::Yes)
}

fn body(args: &SetRoleBinding) -> Value {
    let kinds = [("user", &args.user), ("group", &args.group), ("token", &args.token), ("spiffe", &args.spiffe)];
    let subjects = kinds.into_iter().flat_map(|(kind, names)| names.iter().map(move |name| json!({ kind: name })));
    let role = match args.role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    };
    let mut body = json!({"subjects": subjects.collect::<Vec<_>>(), "role": role});
    if let (false, Value::Object(fields)) = (args.namespace.is_empty(), &mut body) {
        fields.insert("namespaces".to_owned(), json!(args.namespace));
    }
    body
}

fn list(bindings: &[RoleBinding]) -> String {
    let mut table = Table::new(&["NAME", "ROLE", "NAMESPACES", "SUBJECTS", "VERSION"]);
    for binding in bindings {
        let subject = |subject: &std::collections::BTreeMap<String, String>| {
            subject.iter().map(|(kind, name)| format!("{kind} {name}")).collect::<Vec<_>>().join(" ")
        };
        let subjects: Vec<String> = binding.subjects.iter().map(subject).collect();
        table.row([
            binding.name.clone(),
            binding.role.clone(),
            binding.namespaces.join(", "),
            subjects.join(", "),
            binding.resource_version.to_string(),
        ]);
    }
    if table.is_empty() {
        return "There is no role binding: only the control plane's own administrator's certificate may do anything.\n"
            .to_owned();
    }
    table.render(0)
}

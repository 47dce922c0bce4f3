//! `isthmusctl context`: which control planes there are to talk to. Talks to none of them.

use std::io::Write;

use crate::{
    Verdict,
    args::ContextCommand,
    context::{self, Choice},
    table::Table,
};

pub(super) fn run(choice: &Choice, command: ContextCommand, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    match command {
        ContextCommand::List => {
            let mut table = Table::new(&["IN USE", "NAME", "SERVER", "AS"]);
            for (name, server, kind, current) in context::list(choice)? {
                table.row([if current { "*" } else { "" }.to_owned(), name, server, kind.to_owned()]);
            }
            write!(out, "{}", table.render(0))?;
        }
        ContextCommand::Current => writeln!(out, "{}", context::current(choice)?)?,
        ContextCommand::Use { name } => {
            context::switch(choice, &name)?;
            eprintln!("{name} is in use from now on.");
        }
        ContextCommand::Add { name, file, token_file } => {
            context::add(choice, &name, &file, token_file.as_deref())?;
            eprintln!("{name} added. `isthmusctl context use {name}` puts it in use.");
        }
        ContextCommand::Remove { name } => {
            context::remove(choice, &name)?;
            eprintln!("{name} forgotten; the files that it named are still there.");
        }
    }
    Ok(Verdict::Yes)
}

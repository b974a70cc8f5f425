//! Parses a command line. Negative numbers are values, so that the error of a flag can state its range.

use std::any::TypeId;
use std::ffi::OsString;
use std::fmt::Display;
use std::str::FromStr;

use clap::{Arg, Command, Parser};

/// As [`Parser::try_parse_from`], but `--seed -1` is not refused as the flag `-1`.
///
/// # Errors
/// What clap refuses; [`clap::Error::exit`] prints it.
pub fn parse<T: Parser>(words: impl IntoIterator<Item: Into<OsString> + Clone>) -> Result<T, clap::Error> {
    let matches = with_numbers(T::command()).try_get_matches_from(words)?;
    T::from_arg_matches(&matches).map_err(|error| error.format(&mut T::command()))
}

fn with_numbers(command: Command) -> Command {
    command.mut_args(number).mut_subcommands(with_numbers)
}

fn number(arg: Arg) -> Arg {
    if arg.get_long().is_none() || !arg.get_action().takes_values() {
        return arg;
    }
    let of = arg.get_value_parser().type_id();
    let arg = arg.allow_negative_numbers(true);
    if of == TypeId::of::<u32>() {
        arg.value_parser(|text: &str| whole(text, u32::MAX))
    } else if of == TypeId::of::<u64>() {
        arg.value_parser(|text: &str| whole(text, u64::MAX))
    } else if of == TypeId::of::<usize>() {
        arg.value_parser(|text: &str| whole(text, usize::MAX))
    } else if of == TypeId::of::<f32>() || of == TypeId::of::<f64>() {
        // clap does not accept `-1e-3` and `-inf` as negative numbers.
        arg.allow_hyphen_values(true)
    } else {
        arg
    }
}

fn whole<T: FromStr + Display>(text: &str, max: T) -> Result<T, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {max}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "test")]
    struct Flags {
        #[command(subcommand)]
        command: Subcommand,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Subcommand {
        Run {
            #[arg(long, default_value_t = 1)]
            count: u32,
            #[arg(long, default_value_t = 0.5)]
            rate: f64,
            #[arg(long)]
            fast: bool,
            #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
            words: Vec<String>,
        },
    }

    #[test]
    fn negative_numbers_are_values() {
        let parse = |flags: &str| parse::<Flags>(format!("test run {flags}").split_whitespace().map(str::to_owned));
        let Subcommand::Run { count, rate, fast, words } = parse("--rate -1e-3 --fast --count 7 x -2").unwrap().command;
        assert_eq!((count, rate, fast, words), (7, -1e-3, true, vec!["x".to_owned(), "-2".to_owned()]));
        for (flags, want) in [
            ("--count -1", "invalid value '-1' for '--count <COUNT>': expected a whole number from 0 to 4294967295"),
            ("--count 4294967296", "expected a whole number from 0 to 4294967295"),
            ("--count 1.5", "expected a whole number from 0 to 4294967295"),
            ("--rate -x", "invalid value '-x' for '--rate <RATE>'"),
        ] {
            let error = parse(flags).unwrap_err();
            assert!(error.to_string().contains(want) && error.exit_code() == 2, "{flags}: {error}");
        }
    }
}

//! Parses a command line. Accepts negative numbers as values, so that the error of a flag can state the flag's range.

use std::any::TypeId;
use std::ffi::OsString;
use std::fmt::Display;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Arg, Command, Parser};
use shardflow_job::departure;
use shardflow_job::exit::Exit;

/// Parses the command line of this program, as [`parse`] does. On an error or a request for help, prints the text and
/// returns the exit code for `main`. Also reports an error to the launcher and the other processes.
///
/// # Errors
/// The exit code for `main`, which is 0 after a request for help.
pub fn parse_own<T: Parser>() -> Result<T, ExitCode> {
    parse(std::env::args_os()).map_err(|error| {
        // A closed pipe is not an error.
        let _ = error.print();
        let exit = Exit::from_code(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage.code()));
        if exit != Exit::Done
            && let Err(e) = departure::report(exit, &first_line(&error), None)
        {
            eprintln!("warning: cannot write the report for the launcher: {e}");
        }
        exit.into()
    })
}

/// The first line of the parser's message, without `error: `.
pub fn first_line(error: &clap::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").into()
}

/// Like [`Parser::try_parse_from`], but `--seed -1` does not parse `-1` as a flag.
pub fn parse<T: Parser>(words: impl IntoIterator<Item: Into<OsString> + Clone>) -> Result<T, clap::Error> {
    let matches = with_negative_numbers(T::command()).try_get_matches_from(words)?;
    T::from_arg_matches(&matches).map_err(|error| error.format(&mut T::command()))
}

fn with_negative_numbers(command: Command) -> Command {
    command.mut_args(accept_negative).mut_subcommands(with_negative_numbers)
}

fn accept_negative(arg: Arg) -> Arg {
    if arg.get_long().is_none() || !arg.get_action().takes_values() {
        return arg;
    }
    let value_type = arg.get_value_parser().type_id();
    let arg = arg.allow_negative_numbers(true);
    if value_type == TypeId::of::<u32>() {
        arg.value_parser(|text: &str| parse_whole(text, u32::MAX))
    } else if value_type == TypeId::of::<u64>() {
        arg.value_parser(|text: &str| parse_whole(text, u64::MAX))
    } else if value_type == TypeId::of::<usize>() {
        arg.value_parser(|text: &str| parse_whole(text, usize::MAX))
    } else if value_type == TypeId::of::<f32>() {
        // clap does not accept `-1e-3` and `-inf` as negative numbers.
        arg.allow_hyphen_values(true).value_parser(parse_number::<f32>)
    } else if value_type == TypeId::of::<f64>() {
        arg.allow_hyphen_values(true).value_parser(parse_number::<f64>)
    } else {
        arg
    }
}

fn parse_whole<T: FromStr + Display>(text: &str, max: T) -> Result<T, String> {
    text.parse().map_err(|_| format!("expected a whole number of at most {max}, without a sign"))
}

fn parse_number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "expected a number, such as 0.5 or 1e-3".into())
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
        for (flags, expected) in [
            (
                "--count -1",
                "invalid value '-1' for '--count <COUNT>': expected a whole number of at most 4294967295, without a sign",
            ),
            ("--count 4294967296", "expected a whole number of at most 4294967295, without a sign"),
            ("--count 1.5", "expected a whole number of at most 4294967295, without a sign"),
            ("--rate -x", "invalid value '-x' for '--rate <RATE>': expected a number, such as 0.5 or 1e-3"),
        ] {
            let error = parse(flags).unwrap_err();
            assert!(error.to_string().contains(expected) && error.exit_code() == 2, "{flags}: {error}");
        }
    }
}

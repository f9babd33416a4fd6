//! Test files that mostly wait, several at a time: each as its own process, its output in one piece when it ends.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Command,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use super::{Tally, summary};
use crate::{Failure, Outcome, sh};

/// Files at a time. A cluster waits for timers far more than it computes; two of them fill two cores.
const LANES: usize = 2;
/// For a file: several times what the longest takes.
const LIMIT: Duration = Duration::from_secs(1500);

/// Runs each file by the command that `command` makes of words, in the order given, counts, and prints by `say`. A file
/// that fails does not keep the others from running.
pub(super) fn run(
    tests: &[(String, PathBuf)],
    command: impl Fn(&[&str]) -> Outcome<Command> + Sync,
    say: impl Fn(&str) + Sync,
    tally: &mut Tally,
) -> Outcome {
    let folder = sh::target().join("test-output");
    fs::create_dir_all(&folder)?;
    let waiting = Mutex::new(tests.iter());
    let done = Mutex::new(tally);
    thread::scope(|scope| {
        for _ in 0..LANES.min(tests.len()) {
            scope.spawn(|| {
                while let Some((name, path)) = waiting.lock().ok().and_then(|mut waiting| waiting.next()) {
                    say(&format!("-- {name} begins"));
                    let start = Instant::now();
                    let log = folder.join(format!("{name}.log"));
                    let limit = LIMIT.as_secs().to_string();
                    // In the foreground, so that Ctrl-C reaches the file; what it leaves then the next one removes.
                    let words =
                        ["timeout", "--foreground", "--kill-after=30", &limit, &path.to_string_lossy()];
                    let ended = command(&words).and_then(|command| to_file(command, &log));
                    let text = fs::read(&log).unwrap_or_default();
                    let text = String::from_utf8_lossy(&text);
                    let Ok(mut tally) = done.lock() else { return };
                    let took = start.elapsed();
                    say(&format!("-- {name}, {} s\n{}", took.as_secs(), text.trim_end()));
                    if let Some(broken) = count(&text, ended, took, &mut tally) {
                        let line = format!("{name}: {broken}; its output is in {}", log.display());
                        say(&line);
                        tally.broken.push(line);
                    }
                }
            });
        }
    });
    Ok(())
}

/// Runs a command with all output into a file: a process that the command leaves keeps nobody waiting. Gives the exit
/// code, none where a signal ended it.
fn to_file(mut command: Command, log: &PathBuf) -> Outcome<Option<i32>> {
    let out = File::create(log)?;
    Ok(command.stderr(out.try_clone()?).stdout(out).status()?.code())
}

/// Counts the tests of a file; what is wrong with it where no test says so.
fn count(text: &str, ended: Outcome<Option<i32>>, took: Duration, tally: &mut Tally) -> Option<String> {
    let found: Vec<_> = text.lines().filter_map(summary).collect();
    let failures: u64 = found.iter().map(|(_, failed)| failed).sum();
    tally.passed += found.iter().map(|(passed, _)| passed).sum::<u64>();
    tally.failed += failures;
    match ended {
        Err(Failure::Failed(why) | Failure::Usage(why) | Failure::Unable(why)) => Some(why),
        Ok(code) if code != Some(0) && took >= LIMIT => {
            Some(format!("it was ended after {} s", LIMIT.as_secs()))
        }
        Ok(Some(0)) if found.is_empty() => Some("it ran no tests".into()),
        Ok(Some(0)) => None,
        // The summary has told it.
        Ok(Some(_)) if failures > 0 => None,
        Ok(code) => {
            Some(format!("it ended with {}", code.map_or("a signal".into(), |code| code.to_string())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(tests: &[(&str, &str)]) -> Tally {
        let tests: Vec<_> =
            tests.iter().map(|(name, script)| ((*name).to_owned(), PathBuf::from(script))).collect();
        let mut tally = Tally::default();
        let script = |words: &[&str]| {
            let mut command = Command::new("sh");
            command.args(["-c", words.last().copied().unwrap_or_default()]);
            Ok(command)
        };
        assert!(run(&tests, script, |_| (), &mut tally).is_ok());
        tally
    }

    #[test]
    fn all_are_counted_whatever_becomes_of_one() {
        let line =
            |passed, failed| format!("echo 'test result: x. {passed} passed; {failed} failed; 0 ignored'");
        let tally = ran(&[
            ("lanes-a", &line(2, 0)),
            ("lanes-b", &format!("{}; exit 101", line(1, 1))),
            ("lanes-c", "echo crashed >&2; exit 3"),
            ("lanes-e", "true"),
            ("lanes-f", &line(4, 0)),
        ]);
        assert_eq!((tally.passed, tally.failed), (7, 1));
        let mut broken =
            tally.broken.iter().map(|line| line.split(';').next().unwrap_or_default()).collect::<Vec<_>>();
        broken.sort_unstable();
        let told = ["lanes-c: it ended with 3", "lanes-e: it ran no tests"];
        assert_eq!(broken, told);
    }

    #[test]
    fn one_that_took_too_long_is_told() {
        let told = count("", Ok(Some(124)), LIMIT, &mut Tally::default());
        assert_eq!(told.as_deref(), Some("it was ended after 1500 s"));
    }
}

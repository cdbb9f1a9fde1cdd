//! The command as a user runs it, with a bound on its time.

#![allow(dead_code, reason = "every test binary uses its own part of this")]

pub(crate) mod guests;
pub(crate) mod http;

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The command's built-in guest, of which `run` knows nothing.
pub(crate) const CYCLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/cycle2.wat");
/// The same for WASI 0.3.
pub(crate) const CYCLE_3: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/cycle3.wat");

/// Set by `scripts/test` where the Rust guests' compiler cannot be had.
const WITHOUT_RUST: &str = "WASI_URING_WITHOUT_RUST_GUEST";

/// Whether Rust guests could be built here; if not, it is said that this is not tested.
pub(crate) fn has_rust_guests(untested: &str) -> bool {
    if std::env::var_os(WITHOUT_RUST).is_none() {
        return true;
    }
    // Past the test runner, which keeps a passing test's output to itself.
    let note = format!(
        "\nNOT TESTED: {untested}, whose compiler cannot be had here (scripts/guests says why)\n"
    );
    std::io::stderr().write_all(note.as_bytes()).unwrap();
    false
}

/// Longest that one command may take before the test says that it hangs.
const BOUND: Duration = Duration::from_mins(10);

/// How a command ended and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Fails, with all that was said, unless the command ended with this code.
    #[track_caller]
    pub(crate) fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        assert!(!self.stderr.contains("panicked"), "{self}");
        self
    }

    /// Fails unless stderr contains every one of these.
    #[track_caller]
    pub(crate) fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "nothing about {part:?} in {self}");
        }
        self
    }

    /// The JSON of `--stats`, which is stderr's last line.
    #[track_caller]
    pub(crate) fn stats(&self) -> serde_json::Value {
        let line = self.stderr.lines().last().unwrap_or_default();
        serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("the last line is no JSON ({error}): {self}"))
    }

    /// How many lines of stderr contain this.
    pub(crate) fn lines_with(&self, part: &str) -> usize {
        self.stderr.lines().filter(|line| line.contains(part)).count()
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, stdout, stderr } = self;
        write!(f, "code {code:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}\n---")
    }
}

/// The command under test, to be given more and run by [`end`].
pub(crate) fn command(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    wrapped::<&str>(&[], args)
}

/// The same, started by another program such as prlimit(1).
pub(crate) fn wrapped<S: AsRef<OsStr>>(
    wrapper: &[S],
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Command {
    let tool = OsStr::new(env!("CARGO_BIN_EXE_wasi-uring"));
    let mut line = wrapper.iter().map(AsRef::as_ref).chain([tool]);
    let mut command = Command::new(line.next().expect("the tool at least"));
    command.args(line).args(args).env_remove("RUST_LOG");
    command
}

/// Runs the command under test to its end.
#[track_caller]
pub(crate) fn run(args: &[&str]) -> Ended {
    end(command(args))
}

/// Runs any command to its end, without stdin.
#[track_caller]
pub(crate) fn end(mut command: Command) -> Ended {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn();
    wait(child.unwrap_or_else(|error| {
        let program = command.get_program().display();
        panic!("cannot run {program} ({error}); scripts/test installs what tests need")
    }))
}

/// Runs a command to its end whose stdout nobody reads.
#[track_caller]
pub(crate) fn end_without_stdout(mut command: Command) -> Ended {
    command.stdin(Stdio::null()).stdout(abandoned()).stderr(Stdio::piped());
    wait(command.spawn().expect("the command"))
}

/// Runs a command to its end whose stderr nobody reads.
#[track_caller]
pub(crate) fn end_without_stderr(mut command: Command) -> Ended {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(abandoned());
    wait(command.spawn().expect("the command"))
}

/// A pipe whose reader has gone.
fn abandoned() -> std::io::PipeWriter {
    let (_reader, writer) = std::io::pipe().expect("a pipe");
    writer
}

/// Waits for a child, and kills one that hangs.
#[track_caller]
pub(crate) fn wait(mut child: Child) -> Ended {
    let stdout = child.stdout.take().map(read);
    let stderr = child.stderr.take().map(read);
    let deadline = Instant::now() + BOUND;
    let mut hangs = false;
    let status = loop {
        if let Some(status) = child.try_wait().expect("our own child") {
            break status;
        }
        if Instant::now() > deadline && !hangs {
            hangs = true;
            child.kill().expect("our own child");
        }
        thread::sleep(Duration::from_millis(2));
    };
    let text = |reader: Option<thread::JoinHandle<String>>| {
        reader.map(|reader| reader.join().expect("a reader")).unwrap_or_default()
    };
    let ended = Ended { code: status.code(), stdout: text(stdout), stderr: text(stderr) };
    assert!(!hangs, "hangs: {ended}");
    ended
}

fn read(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A file of these contents. Names must differ between tests, because tests run at the same time.
pub(crate) fn file(name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut file = std::fs::File::create(&path).expect("a temporary file");
    file.write_all(contents.as_ref()).expect("a temporary file");
    path
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

//! What a save may replace, and what is left of one that is killed. (Drafts of threads and long names: unit tests of
//! storage/draft.rs.)
#![cfg(unix)]

use blr_merge::storage::Draft;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn save(path: &Path, bytes: &[u8]) -> blr_merge::Result<()> {
    let draft = Draft::of_file(path)?;
    draft.output().write_all(bytes).unwrap();
    draft.commit()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// For [`child`]: what it does, and with which file.
const TASK: &str = "BLR_MERGE_TEST_TASK";

/// This program once more, doing one thing.
fn process(task: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env(TASK, task).env("BLR_MERGE_TEST_PATH", path);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Not a test of its own: what other processes do.
#[test]
fn child() {
    let (Ok(task), Some(path)) = (std::env::var(TASK), std::env::var_os("BLR_MERGE_TEST_PATH")) else { return };
    let path = PathBuf::from(path);
    match task.as_str() {
        "save" => save(&path, b"new").unwrap(),
        "for ever" => (0..u64::MAX).for_each(|n| save(&path, &vec![n as u8; LENGTH]).unwrap()),
        _ => {
            let draft: Draft =
                if task == "half a folder" { Draft::of_folder(&path).unwrap() } else { Draft::of_file(&path).unwrap() };
            if draft.path().is_dir() {
                fs::write(draft.path().join("shard"), "half").unwrap();
            } else {
                draft.output().write_all(b"half").unwrap();
            }
            File::create(path.with_extension("half")).unwrap();
            std::thread::sleep(Duration::from_secs(600));
        }
    }
}

const LENGTH: usize = 1 << 20;

/// A process that has written half of a draft, and waits.
fn half(task: &str, path: &Path) -> Child {
    let marker = path.with_extension("half");
    let child = process(task, path).spawn().unwrap();
    let begin = Instant::now();
    while !marker.exists() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the child does not begin");
        std::thread::sleep(Duration::from_millis(2));
    }
    fs::remove_file(marker).unwrap();
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// The draft of a process that lives stays, whoever else saves; that of one that was killed goes with the next save.
#[test]
fn drafts_of_killed_processes_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    save(&path, b"old").unwrap();
    let child = half("half a file", &path);
    let with_draft = names(folder.path());
    assert_eq!(with_draft.len(), 2, "{with_draft:?}");
    save(&path, b"other").unwrap();
    assert_eq!(names(folder.path()), with_draft);
    kill(child);
    assert_eq!((names(folder.path()), fs::read(&path).unwrap()), (with_draft, b"other".to_vec()));
    save(&path, b"new").unwrap();
    assert_eq!((names(folder.path()), fs::read(&path).unwrap()), (vec!["x".to_owned()], b"new".to_vec()));

    // Folders of shards as well, and nothing of them is at the path before all is.
    let shards = folder.path().join("shards");
    let child = half("half a folder", &shards);
    drop(Draft::of_folder(&shards).unwrap());
    assert!(names(folder.path()).len() == 2 && !shards.exists());
    kill(child);
    assert_eq!(names(folder.path()).len(), 2);
    Draft::of_folder(&shards).unwrap().commit().unwrap();
    assert_eq!(names(folder.path()), ["shards", "x"]);
}

/// Killed at any moment: what is there is whole, and drafts do not pile up.
#[test]
fn kills_leave_a_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    save(&path, &vec![255; LENGTH]).unwrap();
    for round in 0..25u64 {
        let before = fs::metadata(&path).unwrap().ino();
        let child = process("for ever", &path).spawn().unwrap();
        let begin = Instant::now();
        while fs::metadata(&path).unwrap().ino() == before {
            assert!(begin.elapsed() < Duration::from_secs(60), "the child does not save");
            std::thread::sleep(Duration::from_millis(1));
        }
        // Within its second save, or one of the next.
        std::thread::sleep(Duration::from_micros(round * 700));
        kill(child);
        let found = fs::read(&path).unwrap();
        assert!(found.len() == LENGTH && found.iter().all(|b| *b == found[0]), "round {round}");
        // That of this round at most: its own first save has swept those of the rounds before.
        assert!(names(folder.path()).len() <= 2, "{:?}", names(folder.path()));
    }
    save(&path, b"last").unwrap();
    assert_eq!(names(folder.path()), ["x"]);
}

#[test]
fn only_regular_files_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let _socket = UnixListener::bind(at("socket")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    symlink("pipe", at("link to a pipe")).unwrap();
    symlink("circle", at("circle")).unwrap();
    let before = names(folder.path());
    for (name, says) in [
        ("pipe", "cannot be written: there is a pipe, and only a regular file"),
        ("socket", "there is a socket"),
        ("folder", "there is a folder"),
        ("link to a pipe", "there is a pipe"),
        ("circle", "go in a circle"),
        ("/dev/null", "there is a device"),
    ] {
        let e = Draft::of_file(at(name)).unwrap_err().to_string();
        assert!(e.contains(says) && e.starts_with(&at(name).display().to_string()), "{e}");
        assert!(Draft::of_folder(at(name)).is_err() == (name != "folder"), "{name}");
        assert_eq!(names(folder.path()), before);
    }
    // Also if it comes while the draft is written.
    let draft = Draft::of_file(at("late")).unwrap();
    assert!(Command::new("mkfifo").arg(at("late")).status().unwrap().success());
    let e = draft.commit().unwrap_err().to_string();
    assert!(e.contains("there is a pipe") && names(folder.path()).len() == before.len() + 1, "{e}");
}

#[test]
fn links_stay_and_their_targets_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("runs")).unwrap();
    save(&at("runs/1"), b"old").unwrap();
    symlink("runs/1", at("latest")).unwrap();
    symlink(at("latest"), at("link to a link")).unwrap();
    symlink("runs/2", at("dangling")).unwrap();
    symlink("none/2", at("nowhere")).unwrap();
    save(&at("latest"), b"new").unwrap();
    assert_eq!(fs::read(at("runs/1")).unwrap(), b"new");
    save(&at("link to a link"), b"newer").unwrap();
    assert_eq!(fs::read(at("runs/1")).unwrap(), b"newer");
    save(&at("dangling"), b"first").unwrap();
    assert_eq!(fs::read(at("runs/2")).unwrap(), b"first");
    assert!(save(&at("nowhere"), b"lost").unwrap_err().to_string().contains("nowhere: cannot be written"));
    for link in ["latest", "link to a link", "dangling", "nowhere"] {
        assert!(at(link).is_symlink(), "{link}");
    }
    assert_eq!(names(&at("runs")), ["1", "2"]);
    // A folder of shards, too.
    symlink("runs/shards", at("shards")).unwrap();
    Draft::of_folder(at("shards")).unwrap().commit().unwrap();
    assert!(at("shards").is_symlink() && at("runs/shards").is_dir());
}

/// Somebody who may write into the folder cannot have us write through their link, nor remove what it points at.
#[test]
fn planted_links_are_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("theirs")).unwrap();
    for victim in ["victim", "theirs/victim"] {
        fs::write(at(victim), "precious").unwrap();
    }
    let planted = [".x.blr-0123456789abcdef.tmp", ".x.blr-0123456789abcdee.tmp", ".x.blr-0123456789abcded.tmp"];
    symlink(at("victim"), at(planted[0])).unwrap();
    symlink(at("theirs"), at(planted[1])).unwrap();
    // Opening it would wait for ever.
    assert!(Command::new("mkfifo").arg(at(planted[2])).status().unwrap().success());
    // And the names of before.
    for n in 0..10 {
        symlink(at("victim"), at(&format!(".x.{}-{n}.tmp", std::process::id()))).unwrap();
    }
    save(&at("x"), b"new").unwrap();
    assert_eq!(fs::read(at("x")).unwrap(), b"new");
    for victim in ["victim", "theirs/victim"] {
        assert_eq!(fs::read(at(victim)).unwrap(), b"precious");
    }
}

#[test]
fn modes_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    save(&path, b"old").unwrap();
    // As any new file of the user's.
    File::create(folder.path().join("plain")).unwrap();
    assert_eq!(mode(&path), mode(&folder.path().join("plain")));
    for wanted in [0o600, 0o400, 0o666, 0o640, 0o755] {
        fs::set_permissions(&path, Permissions::from_mode(wanted)).unwrap();
        let draft = Draft::of_file(&path).unwrap();
        // At no moment can others read more than they could.
        assert_eq!(mode(draft.path()), 0o600);
        draft.commit().unwrap();
        assert_eq!(mode(&path), wanted);
    }
    let shards = folder.path().join("shards");
    fs::create_dir(&shards).unwrap();
    fs::set_permissions(&shards, Permissions::from_mode(0o700)).unwrap();
    Draft::of_folder(&shards).unwrap().commit().unwrap();
    assert_eq!(mode(&shards), 0o700);
}

/// A folder where files can be made and names cannot be listed, as for letters: the save has worked, and says so. By
/// a process without the rights of root.
#[test]
fn folders_that_cannot_be_read_can_be_saved_to() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let drop_box = folder.path().join("box");
    fs::create_dir(&drop_box).unwrap();
    let save_there = || {
        let mut command = process("save", &drop_box.join("x"));
        if fs::metadata(&drop_box).unwrap().uid() == 0 {
            command.uid(65_534).gid(65_534);
        }
        command.status().map(|status| status.success())
    };
    fs::set_permissions(&drop_box, Permissions::from_mode(0o333)).unwrap();
    let Ok(first) = save_there() else {
        println!("skipped: this program is in a folder where only root can run it");
        return;
    };
    let again = save_there().unwrap();
    // And one where nothing can be made.
    fs::set_permissions(&drop_box, Permissions::from_mode(0o555)).unwrap();
    let refused = save_there().unwrap();
    fs::set_permissions(&drop_box, Permissions::from_mode(0o755)).unwrap();
    assert_eq!((first, again, refused), (true, true, false));
    assert_eq!((names(&drop_box), fs::read(drop_box.join("x")).unwrap()), (vec!["x".to_owned()], b"new".to_vec()));
}

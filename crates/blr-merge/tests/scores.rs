//! Sweeps and soups: the command, run as its users do, with scores from a command of theirs.
#![cfg(unix)] // The commands are for its shell.

#[path = "support/command.rs"]
mod command;
mod support;

use command::{error, load, models, names, ok, run, save};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use support::{Stored, model};

/// Prints the last number of the file, the second of layer 1.
const LAST: &str = "f=$1; [ -d \"$f\" ] && f=$(ls \"$f\"/*.safetensors | tail -n 1); tail -c 4 \"$f\" | od -An -t f4\n";

fn score(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).unwrap();
}

#[test]
fn sweeps_write_every_weighting_or_its_score() {
    let folder = models();
    let at = folder.path();
    let what =
        "sweep --method task-arithmetic --base models/base.safetensors models/a.safetensors models/b.safetensors";
    let said = ok(at, &format!("{what} --steps 4 --out previews"));
    assert!(
        said.starts_with("0, 1\n0.25, 0.75\n0.5, 0.5\n0.75, 0.25\n1, 0\npreviews: 5 weightings of 2 models\n"),
        "{said}"
    );
    let expected = ["0-1", "0.25-0.75", "0.5-0.5", "0.75-0.25", "1-0"].map(|name| format!("{name}.safetensors"));
    assert_eq!(names(&at.join("previews")), BTreeSet::from(expected));
    assert_eq!(load(&at.join("previews/0.25-0.75.safetensors")), [7.75, 15.5, 23.25]);
    // As merge does it.
    ok(at, &format!("merge{} --weight 0.25,0.75 --out m", what.strip_prefix("sweep").unwrap()));
    assert_eq!(ok(at, "diff m previews/0.25-0.75.safetensors"), "");

    score(at, "last number.sh", LAST);
    let evaluate = "--evaluate 'sh \"last number.sh\"'";
    let said = ok(at, &format!("{what} --steps 2 --out scores {evaluate}"));
    assert!(said.starts_with("0, 1: 40\n0.5, 0.5: 22\n1, 0: 4\n"), "{said}");
    assert_eq!(names(&at.join("scores")), BTreeSet::from(["scores.csv".to_owned()]));
    let table = "\"models/a.safetensors\",\"models/b.safetensors\",score\n0,1,40\n0.5,0.5,22\n1,0,4\n";
    assert_eq!(fs::read_to_string(at.join("scores/scores.csv")).unwrap(), table);
    ok(at, &format!("{what} --steps 1 --out kept {evaluate} --keep --format json --max-shard-size 8"));
    assert_eq!(names(&at.join("kept")), ["0-1", "1-0", "scores.json"].map(str::to_owned).into());
    let table: serde_json::Value = serde_json::from_slice(&fs::read(at.join("kept/scores.json")).unwrap()).unwrap();
    assert_eq!(table["models"][1], "models/b.safetensors");
    assert_eq!(table["rows"][1], serde_json::json!({"weights": [1.0, 0.0], "score": 4.0}));
}

/// Of posteriors learned with one prior, whose sum with α at a corner is that task's.
#[test]
fn sweeps_of_posteriors_are_posteriors() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, m, s) in [("q0", 0.5, 2.0), ("q1", 1.0, 3.0), ("q2", 2.0, 5.0)] {
        let [mean, precision] = [m, s].map(|x| model([("w", Stored::f32(&[x]))]));
        support::save_posterior(&at.join(name), &mean, &precision);
    }
    ok(at, "sweep --method gradient-matching --delta 0 --base q0 q1 q2 --steps 2 --out previews");
    // In the middle 0·q0 + q1/2 + q2/2: the mean is (3·1 + 5·2)/8.
    for (name, m, s) in [("1-0", 1.0, 3.0), ("0.5-0.5", 1.625, 4.0), ("0-1", 2.0, 5.0)] {
        let q = support::load(&at.join(format!("previews/{name}.safetensors")));
        assert_eq!([q["w"].numbers(), q["w.precision"].numbers()], [[m], [s]], "{name}");
    }
}

#[test]
fn sweeps_that_fail_leave_nothing() {
    let folder = models();
    let at = folder.path();
    let before = names(at);
    let ab = "models/a.safetensors models/b.safetensors";
    for (arguments, says) in [
        (format!("--method slerp {ab} --steps 2 --out s"), "no weights to vary"),
        (format!("--method linear {ab} --steps 0 --out s"), "there are no weightings"),
        (format!("--method linear {ab} --steps 100000 --out s"), "more than 10000 weightings"),
        (format!("--method linear {ab} --weight 1,1 --steps 2 --out s"), "has a weight"),
        (format!("--method linear {ab} --steps 2 --out models"), "new or empty folder"),
        (format!("--method linear {ab} --steps 2 --out s --exclude x"), "fits the pattern `x`"),
        (format!("--method linear {ab} --steps 2 --out s --evaluate 'echo x; exit 3 #'"), "failed (exit status: 3)"),
    ] {
        let e = error(at, &format!("sweep {arguments}"));
        assert!(e.contains(says), "{arguments}: {e}");
        assert_eq!(names(at), before);
    }
}

#[test]
fn soups_take_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    // The score is the distance of the last number from 8: alone 8, 4, 2, 12 and 0.
    for (name, head) in [("zero", 0.0), ("two", 2.0), ("three", 3.0), ("ten", 10.0), ("four", 4.0)] {
        save(at, name, [head, head, head]);
    }
    score(
        at,
        "score.sh",
        "x=$(tail -c 4 \"$1\" | od -An -t f4); awk \"BEGIN { x = $x - 8; print x < 0 ? -x : x }\"; echo \"$1\" >> runs\n",
    );
    let before = names(at);
    let soup = "soup zero two three ten --evaluate 'sh score.sh' --out 'my soup'";
    let said = ok(at, &format!("{soup} --lower-is-better"));
    // three (2), with two 2·2.5 - 8 = 3: no; with zero 5: no; with ten 2·6.5 - 8 = 5: no.
    assert_eq!(
        said,
        "three: 2\ntwo: 4\nzero: 8\nten: 12\nsoup of three: 2\nmy soup: weights of 3 tensors, 6 elements\n"
    );
    assert_eq!(fs::read_to_string(at.join("runs")).unwrap().lines().count(), 7);
    let said = ok(at, &format!("{soup} --higher-is-better"));
    // ten (12); with zero 2; with two 4, with three 5: no.
    assert!(said.contains("soup of ten: 12\n"), "{said}");
    // zero and ten: 2·5 - 8 = 2, then two: 2·4 - 8 = 0, which three (2·3.75 - 8) makes worse, and four does not.
    let said = ok(at, "soup ten zero two four --evaluate 'sh score.sh' --lower-is-better --out 'my soup'");
    assert!(said.starts_with("four: 0\ntwo: 4\nzero: 8\nten: 12\n"), "{said}");
    assert!(said.contains("soup of four: 0\n"), "{said}");
    let said = ok(at, "soup ten two --evaluate 'sh score.sh' --lower-is-better --out 'my soup'");
    assert!(said.contains("soup of two, ten: 4\n"), "2·6 - 8 does not get worse: {said}");
    assert_eq!(support::load(&at.join("my soup"))["head.w"], Stored::f32(&[6.0, 12.0]));
    let mut after = names(at);
    assert!(after.remove("my soup") && after.remove("runs"));
    assert_eq!(after, before);
    // From a recipe.
    fs::write(at.join("recipe.toml"), "out = 'r'\n[[models]]\npath = 'ten'\n[[models]]\npath = 'two'\n").unwrap();
    ok(at, "soup --recipe recipe.toml --evaluate 'sh score.sh' --lower-is-better");
    assert_eq!(load(&at.join("r")), [6.0; 3]);
}

#[test]
fn commands_that_fail_are_told_with_what_they_said() {
    let folder = models();
    let at = folder.path();
    fs::write(at.join("m"), "old").unwrap();
    let before = names(at);
    let models = "models/a.safetensors models/b.safetensors --out m";
    for (command, says) in [
        ("echo sad >&2; exit 3; :", "`echo sad >&2; exit 3; :` failed (exit status: 3): sad"),
        ("false", "it wrote nothing on stderr"),
        ("no-such-command-here", "no-such-command-here"),
        ("echo", "expected one finite number"),
        ("echo 1 2; :", "printed `1 2`: expected one finite number"),
        ("echo nan; :", "printed `nan`"),
        ("echo inf; :", "printed `inf`"),
        ("echo; :", "printed ``"),
        ("kill -9 $$; :", "failed (signal: 9"),
    ] {
        let e = error(at, &format!("soup {models} --evaluate '{command}' --higher-is-better"));
        assert!(e.contains("the evaluation `") && e.contains(says), "{command}: {e}");
        assert_eq!(names(at), before);
        assert_eq!(fs::read(at.join("m")).unwrap(), b"old");
    }
    for (arguments, says) in [
        ("--evaluate 'echo 1; :'", "--higher-is-better|--lower-is-better"),
        ("--evaluate 'echo 1; :' --higher-is-better --lower-is-better", "cannot be used with"),
        ("--higher-is-better", "--evaluate"),
    ] {
        let out = run(at, &format!("soup {models} {arguments}"));
        assert!(String::from_utf8(out.stderr).unwrap().contains(says), "{arguments}");
    }
    let e = error(at, &format!("soup {models} --evaluate 'echo 1; :' --higher-is-better --method karcher"));
    assert!(e.contains("a soup is an average"), "{e}");
    let e = error(at, "soup models/a.safetensors --evaluate 'echo 1; :' --higher-is-better --out none/m");
    assert!(e.contains("cannot be written"), "{e}");
}

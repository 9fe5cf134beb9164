//! The command `blr-merge`, run as its users do.

#[path = "support/command.rs"]
mod command;
mod support;

use command::{error, ok, run};
use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{Model, Stored, model, save_posterior};

fn save(folder: &Path, name: &str, w: &[f32]) {
    support::save(&folder.join(name), &model([("w", Stored::f32(w))]));
}

fn load(folder: &Path, name: &str) -> Vec<f32> {
    support::load(&folder.join(name))["w"].numbers()
}

fn models() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    save(at, "base.safetensors", &[0.0, 0.0, 1.0]);
    save(at, "a.safetensors", &[2.0, 0.0, 1.0]);
    save(at, "b.safetensors", &[4.0, 1.0, -1.0]);
    save(at, "fa.safetensors", &[1.0, 1.0, 3.0]);
    save(at, "fb.safetensors", &[3.0, 1.0, 1.0]);
    save(at, "f0.safetensors", &[1.0, 1.0, 1.0]);
    folder
}

#[test]
fn every_method() {
    let folder = models();
    let both = "a.safetensors b.safetensors --out m.safetensors";
    let fisher = "--fisher fa.safetensors --fisher fb.safetensors";
    let base = "--base base.safetensors";
    for (options, expected) in [
        ("--method average".to_owned(), [3.0, 0.5, 0.0]),
        ("--method linear --weight 3,1".to_owned(), [2.5, 0.25, 0.5]),
        ("--method linear --weight 1 --weight -1 --no-normalize".to_owned(), [-2.0, -1.0, 2.0]),
        (format!("--method task-arithmetic {base}"), [6.0, 1.0, -1.0]),
        (format!("--method task-arithmetic {base} --weight 1,0.5 --lambda 2"), [8.0, 1.0, -1.0]),
        (format!("--method ties --density 0.67 {base}"), [3.0, 0.0, -1.0]),
        (format!("--method ties --density 0.34 --no-normalize {base}"), [6.0, 0.0, 1.0]),
        (format!("--method dare --density 1 {base}"), [6.0, 1.0, -1.0]),
        (format!("--method dare-ties --density 1 --rescale l1 {base}"), [3.0, 1.0, -1.0]),
        (format!("--method della --density 1 --epsilon 0 {base}"), [3.0, 1.0, -1.0]),
        (format!("--method breadcrumbs --beta 0.34 --gamma 0.34 {base} --lambda 2"), [0.0, 0.0, -3.0]),
        (format!("--method sce --density 0.67 {base}"), [88.0 / 24.0, 0.0, -1.0]),
        // cos = 8/(2 √21), t = 2 cos/(1 + cos).
        (format!("--method model-stock {base}"), [2.796_363_4, 0.466_060_56, 0.067_878_89]),
        ("--method slerp -t 1".to_owned(), [4.0, 1.0, -1.0]),
        ("--method karcher --weight 0,1".to_owned(), [4.0, 1.0, -1.0]),
        (format!("--method fisher {fisher}"), [3.5, 0.5, 0.5]),
        // Precisions 1 + F: (2·2 + 4·4)/5, 2·1/3 and 1 + 2·(-2)/5.
        (format!("--method gradient-matching {base} --base-fisher f0.safetensors {fisher}"), [4.0, 2.0 / 3.0, 0.2]),
    ] {
        let said = ok(folder.path(), &format!("merge {options} {both}"));
        assert_eq!(said, "m.safetensors: weights of 1 tensors, 3 elements\n");
        let found = load(folder.path(), "m.safetensors");
        let close = found.iter().zip(expected).all(|(x, y): (&f32, f32)| (x - y).abs() < 1e-6);
        assert!(close, "{options}: {found:?} instead of {expected:?}");
    }
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(names.len(), 7, "{names:?}");
}

#[test]
fn errors_say_what_to_do() {
    let folder = models();
    let at = folder.path();
    save(at, "long.safetensors", &[0.0; 4]);
    fs::write(at.join("broken.safetensors"), "not a header").unwrap();
    for (arguments, says) in [
        (
            "merge --method average a.safetensors long.safetensors --out m",
            "parameter `w`: its shape is [3] in model `a.safe",
        ),
        ("merge --method average a.safetensors none.safetensors --out m", "none.safetensors: cannot be read"),
        ("merge --method average a.safetensors broken.safetensors --out m", "broken.safetensors: is not a whole safe"),
        ("merge --method average a.safetensors b.safetensors --lambda 2 --out m", "lambda has no part"),
        ("merge --method linear a.safetensors b.safetensors --weight 1 --out m", "--weight is given 1 times for 2"),
        ("merge --method combine a.safetensors b.safetensors --clamp --out m", "clamp has no part"),
        (
            "merge --method gradient-matching --base base.safetensors --base-fisher f0.safetensors a.safetensors \
             --fisher fa.safetensors --clamp --out m",
            "clamp has no part",
        ),
        ("merge --method ties --base base.safetensors a.safetensors --out m", "needs density"),
        ("merge --method della --density 0.5 --base base.safetensors a.safetensors --out m", "needs epsilon"),
        ("merge --method breadcrumbs --beta 0.5 --base base.safetensors a.safetensors --out m", "needs gamma"),
        ("merge --method sce --base base.safetensors a.safetensors --out m", "needs density"),
        (
            "merge --method sce --density 1 --weight 1 --base base.safetensors a.safetensors --out m",
            "weight has no part",
        ),
        ("merge --method ties --density 1 --epsilon 1 --base base.safetensors a.safetensors --out m", "epsilon has no"),
        ("merge a.safetensors --out m", "there is no method"),
        ("merge --method average a.safetensors b.safetensors", "there is no place for the result"),
        ("merge --method average a.safetensors --exclude [w --out m", "`[w` is not a pattern"),
        ("merge --method ties --density 2 --base base.safetensors a.safetensors --out m", "`density` = 2"),
        ("merge --method ties --density 0.5 a.safetensors --out m", "needs the base"),
        ("merge --method fisher a.safetensors --out m", "is not a posterior that tch-blr has saved"),
        ("merge --method average a.safetensors --out none/m", "cannot be written"),
        ("merge --method average a.safetensors ./a.safetensors --out m", "give one model once, with a larger weight"),
        ("merge --method average a.safetensors b.safetensors --name x,x --out m", "two models are `x`"),
        ("merge --method average a.safetensors b.safetensors --name x --out m", "--name is given 1 times for 2"),
        ("merge --method average a.safetensors b.safetensors --exclude v.* --out m", "no tensor's name fits"),
        ("inspect broken.safetensors", "broken.safetensors: is not a whole"),
        ("remove a.safetensors b.safetensors --out m", "is not a posterior"),
    ] {
        let e = error(at, arguments);
        assert!(e.contains(says), "{arguments}: {e}");
        assert!(!at.join("m").exists());
    }
}

#[test]
fn posteriors_merge_and_part() {
    let folder = tempfile::tempdir().unwrap();
    let q = |name: &str, m: f32, s: f32| {
        let [mean, precision] = [m, s].map(|x| model([("w", Stored::f32(&[x]))]));
        save_posterior(&folder.path().join(name), &mean, &precision);
    };
    let read = |name: &str| {
        let q = support::load(&folder.path().join(name));
        assert!(ok(folder.path(), &format!("inspect {name}")).contains("diagonal Gaussian posterior"));
        ["w", "w.precision"].map(|name| q[name].numbers()[0])
    };
    q("q0", 0.5, 2.0);
    q("q1", 1.0, 3.0);
    q("q2", 2.0, 5.0);
    let said = ok(folder.path(), "merge --method gradient-matching --delta 0 --base q0 q1 q2 --out q");
    assert_eq!(said, "q: a posterior of 1 tensors, 1 elements\n");
    assert_eq!(read("q"), [2.0, 6.0]);
    ok(folder.path(), "merge --method combine q1 q2 q0 --weight 1,1,-1 --out same");
    assert_eq!(read("same"), [2.0, 6.0]);
    ok(folder.path(), "remove q q1 --out without");
    assert_eq!(read("without"), [3.0, 3.0]);
    let e = error(folder.path(), "remove q q1 --weight 2.5 --out without");
    assert!(e.contains("removing 2.5") && e.contains("weights below 2e0 can"), "{e}");
    assert_eq!(read("without"), [3.0, 3.0]);
    assert!(ok(folder.path(), "inspect q").contains("a posterior: 1 of the tensors are precisions"));

    // 0.25 + 1 - 2 < 0; with the information 0.25 - 2 as 0 the mean is θ₀ + Σ d, and the precision the base's.
    q("q3", 3.0, 0.25);
    q("q4", 1.0, 1.0);
    let merge = "merge --method gradient-matching --delta 0 --base q0 q3 q4 --out less";
    let e = error(folder.path(), merge);
    assert!(e.contains("`w`: merging leaves 1 of its 1 precisions not positive") && e.contains("below 6.25e-1"), "{e}");
    assert!(e.contains("`clamp`") && !folder.path().join("less").exists(), "{e}");
    ok(folder.path(), &format!("{merge} --clamp"));
    assert_eq!(read("less"), [0.5 + 2.5 + 0.5, 2.0]);
    ok(folder.path(), "merge --method gradient-matching --delta 0 --base q0 q1 q2 --out clamped --clamp");
    assert_eq!(read("clamped"), [2.0, 6.0]);
}

#[test]
fn results_in_shards() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (name, x) in [("a.safetensors", 1f32), ("b.safetensors", 3.0)] {
        let tensors: Model = (0..5u8).map(|i| (format!("layer{i}"), Stored::f32(&[x + f32::from(i); 1000]))).collect();
        support::save(&at.join(name), &tensors);
    }
    let merge = "merge --method average a.safetensors b.safetensors --out";
    ok(at, &format!("{merge} one.safetensors"));
    for (size, shards) in [
        ("8KB", 3),
        ("8kb", 3),
        ("8KiB", 3),
        ("4000", 5),
        ("7.9kib", 3),
        ("7.8KB", 5),
        ("0.008MB", 3),
        ("1MB", 1),
        ("5GB", 1),
        ("1.5gb", 1),
        ("2TB", 1),
    ] {
        let text = ok(at, &format!("{merge} {size} --max-shard-size {size}"));
        assert!(text.contains("weights of 5 tensors, 5000 elements"), "{text}");
        assert_eq!(ok(at, &format!("diff one.safetensors {size}")), "");
        assert!(ok(at, &format!("inspect {size}")).contains(&format!("20000 bytes, {shards} file(s)")), "{size}");
    }
    assert!(error(at, &format!("{merge} 5GB --max-shard-size 5GB")).contains("shards go to a new or empty folder"));
    for size in ["0", "GB", "-1", "5B", "1e3", "1.5.5GB", "infGB", ".GB", "5EB", "99999999999GB", "0.0001KB"] {
        let out = run(at, &format!("{merge} m --max-shard-size={size}"));
        assert_eq!(out.status.code(), Some(2), "{size}");
        let text = String::from_utf8(out.stderr).unwrap();
        assert!(text.contains("--max-shard-size") && text.contains("expected"), "{text}");
        assert!(!at.join("m").exists());
    }
}

#[test]
fn inspect_and_diff() {
    let folder = models();
    let text = ok(folder.path(), "inspect a.safetensors");
    assert!(text.starts_with("w  F32   [3]\n1 tensors, 3 elements, 12 bytes, 1 file(s)\n"), "{text}");
    assert_eq!(ok(folder.path(), "diff a.safetensors a.safetensors"), "");
    let out = run(folder.path(), "diff a.safetensors b.safetensors");
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.starts_with("w: largest difference 2.000e0, norm of the difference 1.342e0"), "{text}");
    error(folder.path(), "diff a.safetensors none");
}

/// What a file says about itself comes to the terminal as text, and not as commands to it.
#[test]
fn control_characters_are_shown_and_not_obeyed() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let evil = "w\u{1b}[2J\u{9b}31m\u{7}\n\u{202e}é";
    let tensors = |x: f32| model([(evil, Stored::f32(&[x]))]);
    support::save_with(&at.join("a"), &tensors(1.0), ("note", "\u{1b}]0;title\u{7}\r\nfake line"));
    support::save(&at.join("b"), &tensors(f32::NAN));
    support::save(&at.join("c"), &tensors(2.0));
    let same = |text: &str| text.chars().all(|c| c == '\n' || !c.is_control() && c != '\u{202e}');
    let inspected = ok(at, "inspect a");
    assert!(same(&inspected) && inspected.contains("w\\u{1b}[2J\\u{9b}31m\\u{7}\\n\\u{202e}é"), "{inspected}");
    assert!(inspected.contains("note: \\u{1b}]0;title\\u{7}\\r\\nfake line"), "{inspected}");
    let different = String::from_utf8(run(at, "diff a c").stdout).unwrap();
    assert!(same(&different) && different.starts_with("w\\u{1b}"), "{different}");
    let merged = ok(at, "merge --method average a c --exclude w* --out m");
    assert!(same(&merged) && merged.contains("copied from the base or the first model: w\\u{1b}"), "{merged}");
    let e = error(at, "merge --method average a b --out m");
    assert!(same(&e) && e.contains("w\\u{1b}[2J"), "{e}");
}

/// What becomes of tensors that are no weights, and that the command says so.
#[test]
fn what_is_not_merged_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let save = |name: &str, x: f32, steps: i64| {
        let t = model([
            ("bn.weight", Stored::f32(&[x])),
            ("bn.running_mean", Stored::f32(&[10.0 * x])),
            ("bn.running_var", Stored::f32(&[x])),
            ("bn.num_batches_tracked", Stored::i64(&[steps])),
            ("head", Stored::f32(&[x])),
        ]);
        support::save(&at.join(name), &t);
    };
    save("base", 1.0, 7);
    save("a", 0.5, 8);
    save("b", 0.2, 9);
    let merge = "merge --method task-arithmetic --base base a b --weight 1,3 --exclude head --out m";
    assert_eq!(
        ok(at, merge),
        "m: weights of 1 tensors, 1 elements\n\
         averaged, being statistics of batch normalization: bn.running_mean, bn.running_var\n\
         copied from the base or the first model: bn.num_batches_tracked, head\n"
    );
    let m = support::load(&at.join("m"));
    let close = |name: &str, x: f32| assert!((m[name].numbers()[0] - x).abs() < 1e-6, "{name}: {:?}", m[name]);
    // 1 - 0.5 - 3·0.8: of a variance that would be no variance.
    close("bn.weight", -1.9);
    close("bn.running_mean", (5.0 + 3.0 * 2.0) / 4.0);
    close("bn.running_var", (0.5 + 3.0 * 0.2) / 4.0);
    close("head", 1.0);
    assert_eq!(m["bn.num_batches_tracked"], Stored::i64(&[7]));

    let adapter = model([("q.lora_A.weight", Stored::f32(&[1.0])), ("q.lora_B.weight", Stored::f32(&[1.0]))]);
    for name in ["l1", "l2"] {
        support::save(&at.join(name), &adapter);
    }
    let e = error(at, "merge --method average l1 l2 --out l");
    assert!(e.contains("`q.lora_A.weight`") && e.contains("the product of averages is not the average"), "{e}");
    ok(at, "merge --method average l1 l2 --factors --out l");
    ok(at, "merge --method average l1 l2 --exclude *.lora_?.weight --out l");
}

#[test]
fn help_has_examples_and_shells_have_completions() {
    let folder = tempfile::tempdir().unwrap();
    let help = ok(folder.path(), "merge --help");
    assert!(help.contains("Examples:") && help.contains("--method ties --density 0.2 --base base.safetensors"));
    for (of, says) in
        [("merge", "--recipe recipe.toml --dry-run"), ("sweep", "--steps 4"), ("soup", "--higher-is-better")]
    {
        let help = ok(folder.path(), &format!("{of} --help"));
        assert!(help.split("Example").nth(1).unwrap().contains(says), "{help}");
    }
    for (shell, says) in [("bash", "complete -F"), ("zsh", "#compdef blr-merge"), ("fish", "complete -c blr-merge")] {
        assert!(ok(folder.path(), &format!("completions {shell}")).contains(says));
    }
}

/// A billion weights in bf16, 320 million of them in one tensor.
fn billion(path: &Path, seed: u64, positive: bool) {
    let shapes = std::iter::once(("embedding".to_owned(), 32_000 * 10_000))
        .chain((0..10).map(|layer| (format!("layer{layer}.weight"), 68_000_000)));
    let mut at = 0u64;
    let entries = shapes.map(|(name, n)| {
        let begin = at;
        at += 2 * n;
        format!("\"{name}\":{{\"dtype\":\"BF16\",\"shape\":[{n}],\"data_offsets\":[{begin},{at}]}}")
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Random signs and significands, exponents of 2⁻⁹ to 2⁻².
    let mut state = seed;
    let mut piece = vec![0u8; 1 << 22];
    while at > 0 {
        for pair in piece.chunks_mut(2) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let sign = if positive { 0 } else { state as u16 & 0x8000 };
            let bits = sign | (118 + ((state >> 20) as u16 & 7)) << 7 | (state >> 32) as u16 & 0x7f;
            pair.copy_from_slice(&bits.to_le_bytes());
        }
        let n = at.min(piece.len() as u64);
        file.write_all(&piece[..n as usize]).unwrap();
        at -= n;
    }
}

/// Peak resident memory of the command, in bytes, and its seconds. Linux.
fn measure(folder: &Path, arguments: &str) -> (u64, f64) {
    let begin = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_blr-merge"))
        .args(arguments.split_whitespace())
        .current_dir(folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = 0;
    loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(1024 * kib.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{arguments}");
            return (peak, begin.elapsed().as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// In `TMPDIR`, where 12 GB must be free: prints seconds and peaks, beside those of reading two of the files and
/// writing one.
#[test]
#[ignore = "12 GB on the disk, minutes: make test-large"]
fn a_billion_weights_in_less_than_a_gibibyte() {
    let folder = tempfile::tempdir().unwrap();
    for (name, seed, positive) in
        [("base", 1, false), ("a", 2, false), ("b", 3, false), ("fa", 4, true), ("fb", 5, true)]
    {
        billion(&folder.path().join(name), seed, positive);
    }
    let begin = Instant::now();
    let mut piece = vec![0; 1 << 22];
    let mut out = fs::File::create(folder.path().join("m")).unwrap();
    let open = |name: &str| fs::File::open(folder.path().join(name)).unwrap();
    let (mut a, mut b) = (open("a"), open("b"));
    loop {
        let n = a.read(&mut piece).unwrap();
        out.write_all(&piece[..n]).unwrap();
        if n == 0 {
            break;
        }
        _ = b.read(&mut piece).unwrap();
    }
    out.sync_all().unwrap();
    println!("reading two files and writing one: {:.1} s", begin.elapsed().as_secs_f64());
    for method in [
        "average",
        "slerp",
        "ties --density 0.2 --base base",
        "fisher --fisher fa --fisher fb",
        "gradient-matching --base base --base-fisher fa --fisher fa --fisher fb",
        "karcher",
        "della --density 0.3 --epsilon 0.2 --base base",
        "breadcrumbs --beta 0.8 --gamma 0.01 --base base",
        "model-stock --base base",
        "sce --density 0.1 --base base",
    ] {
        let (peak, seconds) = measure(folder.path(), &format!("merge a b --out m --method {method}"));
        println!("{method}: {seconds:.1} s, peak {:.0} MiB", peak as f64 / f64::from(1 << 20));
        assert!(peak > 0 && peak < 1 << 30, "{method}: {peak} bytes");
    }
}

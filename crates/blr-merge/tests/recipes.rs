//! Recipe files and dry runs: the command, run as its users do.

#[path = "support/command.rs"]
mod command;
#[path = "support/mutation.rs"]
#[allow(dead_code)] // Files are changed elsewhere.
mod mutation;
mod support;

use command::{error, load, models, names, ok, run};
use std::fs;
use support::{Stored, model};

/// The example of the guide.
fn example() -> String {
    let guide = include_str!("../../../docs/merging.md");
    guide.split("```toml\n").nth(1).unwrap().split("```").next().unwrap().to_owned()
}

#[test]
fn the_example_of_the_guide_merges() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    fs::create_dir(at.join("math-lora")).unwrap();
    let layers = |x: f32| {
        let names =
            ["model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "model.layers.1.attn.weight", "lm_head.weight"];
        model(names.map(|name| (name, Stored::f32(&[x, 2.0 * x, 3.0 * x, 4.0 * x]).shaped(&[2, 2]))))
    };
    support::save(&at.join("base.safetensors"), &layers(0.0));
    support::save(&at.join("code.safetensors"), &layers(2.0));
    let factors = model([
        ("base_model.model.model.layers.1.mlp.lora_A.weight", Stored::f32(&[1.0, 1.0]).shaped(&[1, 2])),
        ("base_model.model.model.layers.1.mlp.lora_B.weight", Stored::f32(&[3.0, 5.0]).shaped(&[2, 1])),
    ]);
    support::save(&at.join("math-lora/adapter_model.safetensors"), &factors);
    fs::write(at.join("recipe.toml"), example()).unwrap();
    let dry = ok(at, "merge --recipe recipe.toml --dry-run");
    let lines: Vec<&str> = dry.lines().collect();
    let half = "task vectors, lambda 1, the largest 0.5, signs elected, normalized";
    let whole = half.replace("the largest 0.5", "the largest 0.9");
    assert_eq!(
        lines,
        [
            "lm_head.weight              BF16  [2, 2]  8 bytes  copied",
            &format!("model.layers.0.mlp.weight   BF16  [2, 2]  8 bytes  {whole}; weights [1.0, 0.7]"),
            &format!("model.layers.1.attn.weight  BF16  [2, 2]  8 bytes  {half}; weights [1.0, 0.7]"),
            &format!("model.layers.1.mlp.weight   BF16  [2, 2]  8 bytes  {half}; weights [0.3, 1.0]"),
            "4 tensors, 32 bytes; nothing is written",
        ]
    );
    assert_eq!(names(at).len(), 4);
    assert!(
        ok(at, "merge --recipe recipe.toml").starts_with("merged.safetensors: weights of 3 tensors, 12 elements\n")
    );
    let merged = support::load(&at.join("merged.safetensors"));
    let bf16 = |x: [f32; 4]| x.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect::<Vec<u8>>();
    // The two largest of each: 6 and 8 of code, of which math has nothing.
    assert_eq!(merged["model.layers.1.attn.weight"].bytes, bf16([0.0, 0.0, 6.0, 8.0]));
    // α/r · BA = 16·(3, 3, 5, 5), whose two largest are weighted 0.3, beside code's weighted 1.
    let m = |d: f32, w: f32| (0.3 * d + w) / 1.3;
    assert_eq!(merged["model.layers.1.mlp.weight"].bytes, bf16([0.0, 0.0, m(80.0, 6.0), m(80.0, 8.0)]));
    assert_eq!(merged["lm_head.weight"].bytes, bf16([0.0; 4]));
}

/// Options and a file are one thing: the same bytes.
#[test]
fn a_file_says_what_options_say() {
    let folder = models();
    let at = folder.path();
    let parts = "[base]\npath = 'base.safetensors'\n[[models]]\npath = 'a.safetensors'\nWEIGHT\n[[models]]\npath = 'b.safetensors'\n";
    let files = "models/a.safetensors models/b.safetensors";
    let base = "--base models/base.safetensors";
    for (options, method, weight) in [
        (
            format!("--method ties --density 0.5 --no-normalize {base}"),
            "name = 'ties'\ndensity = 0.5\nno-normalize = true",
            "",
        ),
        (
            format!("--method task-arithmetic --lambda 2 --weight 3,1 {base}"),
            "name = 'task-arithmetic'\nlambda = 2",
            "weight = 3",
        ),
        (
            format!("--method dare --density 0.5 --seed 3 --rescale l1 {base}"),
            "name = 'dare'\ndensity = 0.5\nseed = 3\nrescale = 'l1'",
            "",
        ),
        (
            format!("--method della --density 0.5 --epsilon 0.3 {base}"),
            "name = 'della'\ndensity = 0.5\nepsilon = 0.3",
            "",
        ),
        (
            format!("--method breadcrumbs --beta 0.5 --gamma 0.1 {base}"),
            "name = 'breadcrumbs'\nbeta = 0.5\ngamma = 0.1",
            "",
        ),
        (format!("--method model-stock {base}"), "name = 'model-stock'", ""),
        (format!("--method sce --density 0.5 {base}"), "name = 'sce'\ndensity = 0.5", ""),
        ("--method karcher --weight 2,1".to_owned(), "name = 'karcher'", "weight = 2.0"),
        ("--method slerp -t 0.25".to_owned(), "name = 'slerp'\nt = 0.25", ""),
    ] {
        let parts =
            if options.contains("--base") { parts } else { parts.split_once("[[").map(|(_, rest)| rest).unwrap() };
        let parts = if options.contains("--base") { parts.to_owned() } else { format!("[[{parts}") };
        let recipe = format!("[method]\n{method}\n{}", parts.replace("WEIGHT", weight));
        // Paths are those of the file's folder.
        fs::write(at.join("models/recipe.toml"), recipe).unwrap();
        ok(at, &format!("merge {options} {files} --out options --dtype bf16"));
        ok(at, "merge --recipe models/recipe.toml --out file --dtype bf16");
        assert_eq!(fs::read(at.join("options")).unwrap(), fs::read(at.join("file")).unwrap(), "{options}");
    }
    let all = "out = 'x'\nmax-shard-size = '8B'\n".replace("8B", "16")
        + "include = ['layers.*', 'head.*']\nexclude = ['layers.0.?']\n\
        dtype = 'f64'\nfactors = true\n[tied]\n'tied' = 'head.w'\n[method]\nname = 'average'\n[[models]]\npath = 'a.safetensors'\n\
        name = 'first'\n[[models]]\npath = 'b.safetensors'\n";
    fs::write(at.join("models/recipe.toml"), all).unwrap();
    assert!(
        ok(at, "merge --recipe models/recipe.toml")
            .contains("copied from the base or the first model: layers.0.w, tied")
    );
    assert_eq!(names(&at.join("models/x")).len(), 5);
    let options = "merge --method average --include layers.*,head.* --exclude layers.0.? --factors --tied tied=head.w \
        --max-shard-size 16 --dtype f64 --out y --name first,b.safetensors";
    ok(at, &format!("{options} {files}"));
    assert_eq!(ok(at, "diff y models/x"), "");
}

#[test]
fn later_rules_prevail() {
    let folder = models();
    let at = folder.path();
    let recipe = |rules: &str| {
        let general = "[method]\nname = 'task-arithmetic'\nlambda = 0.5\n[base]\npath = 'base.safetensors'\n[[models]]\n\
            path = 'a.safetensors'\n[[models]]\npath = 'b.safetensors'\nweight = 2\n";
        fs::write(at.join("models/recipe.toml"), format!("{general}{rules}")).unwrap();
    };
    recipe(
        "[[tensors]]\nmatch = '*'\nweights = [1, 0]\n[[tensors]]\nmatch = 'layers.[1-9].*'\nweights = [0, 1]\n\
        [[tensors]]\nmatch = 'head.*'\nmethod = { lambda = 10 }\n",
    );
    ok(at, "merge --recipe models/recipe.toml --out m");
    assert_eq!(load(&at.join("m")), [0.5, 10.0, 30.0]);
    // A rule with another method has none of the general settings, and one that fits with nothing is an error.
    recipe("[[tensors]]\nmatch = 'layers.*'\nmethod.name = 'linear'\n");
    ok(at, "merge --recipe models/recipe.toml --out m");
    let found = load(&at.join("m"));
    let close = found.iter().zip([7.0, 14.0, 31.5]).all(|(x, y)| (x - y).abs() < 2e-6);
    assert!(close, "{found:?}");
    for (rules, says) in [
        ("[[tensors]]\nmatch = 'none'\nweights = [1, 1]", "no tensor's name fits the pattern `none`"),
        ("[[tensors]]\nmatch = '*'\nweights = [1]", "for `*` there are 1 weights, and 2 models"),
        ("[[tensors]]\nmatch = '*'", "the rule for `*` has neither"),
        ("[[tensors]]\nmatch = '*'\nmethod.density = 0.1", "for `*`: density has no part"),
        ("[[tensors]]\nmatch = '*'\nmethod.name = 'fisher'", "one needs curvature and one does not"),
        (
            "[[tensors]]\nmatch = 'head.*'\nmethod.name = 'linear'\nweights = [1, -1]",
            "`head.w`: merge: the weights sum to 0",
        ),
    ] {
        recipe(rules);
        let e = error(at, "merge --recipe models/recipe.toml --out none");
        assert!(e.contains(says) && !at.join("none").exists(), "{e}");
    }
}

#[test]
fn wrong_recipes_are_told_with_key_and_line() {
    let folder = models();
    let at = folder.path();
    let good = "[method]\nname = 'average'\n[[models]]\npath = 'models/a.safetensors'\n";
    for (text, says) in [
        (format!("{good}wieght = 2\n"), "recipe.toml, line 5: unknown field `wieght`"),
        (format!("outt = 'x'\n{good}"), "recipe.toml, line 1: unknown field `outt`"),
        (format!("{good}[method.x]\n"), "line 5: "),
        (good.replace("average", "avarage"), "line 2: unknown variant `avarage`"),
        (good.replace("'average'", "'average'\nlambda = 'two'"), "line 3: invalid type: string \"two\", expected f64"),
        (good.replace("path", "file"), "line 4: unknown field `file`"),
        (format!("dtype = 'i8'\n{good}"), "line 1: unknown variant `i8`"),
        (format!("max-shard-size = '5EB'\n{good}"), "line 1: expected a unit"),
        (format!("{good}[[models]]\nweight = 1\n"), "missing field `path`"),
        (format!("{good}["), "recipe.toml, line 5"),
        (good.replace("name = 'average'", "lambda = 1"), "there is no method"),
        (good.replace("'average'", "'average'\nlambda = 1"), "lambda has no part in this method"),
        (format!("{good}[base]\npath = 'x'\n"), "base has no part"),
        (
            good.replace("average", "ties").replace("[[", "density = 1\n[base]\npath = 'x'\nweight = 2\n[["),
            "the base has a weight",
        ),
        ("[method]\nname = 'average'\n".to_owned(), "there is no model"),
        (String::new(), "there is no method"),
    ] {
        fs::write(at.join("recipe.toml"), &text).unwrap();
        for arguments in ["merge --recipe recipe.toml --out m", "merge --recipe recipe.toml --dry-run"] {
            let e = error(at, arguments);
            assert!(e.contains(says), "{text}: {e}");
        }
    }
    let e = error(at, "merge --recipe none.toml --out m");
    assert!(e.contains("none.toml: cannot be read"), "{e}");
    fs::write(at.join("recipe.toml"), good).unwrap();
    assert!(error(at, "merge --recipe recipe.toml").contains("there is no place"));
    // Either a file or options.
    for option in ["--method average", "models/a.safetensors", "--exclude x", "--base x", "--lambda 2", "--factors"] {
        let out = run(at, &format!("merge --recipe recipe.toml --out m {option}"));
        let text = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.code() == Some(2) && text.contains("cannot be used with"), "{option}: {text}");
    }
    assert!(!at.join("m").exists());
}

/// Whatever the text, the command ends by itself.
#[test]
fn garbled_recipes_are_errors_or_recipes() {
    let folder = models();
    let at = folder.path();
    let good = "[method]\nname = 'ties'\ndensity = 0.5 # ½\n[base]\npath = 'base.safetensors'\n[[models]]\npath = \
        'a.safetensors'\nweight = 1e0\n[[tensors]]\nmatch = '[hl]*'\nweights = [2]\n";
    let mut random = mutation::Random(0x70e1);
    fs::write(at.join("models/recipe.toml"), good).unwrap();
    ok(at, "merge --recipe models/recipe.toml --dry-run");
    let mut refused = 0;
    for _ in 0..200 {
        fs::write(at.join("models/recipe.toml"), mutation::garbled(good.as_bytes().to_vec(), &mut random)).unwrap();
        let out = run(at, "merge --recipe models/recipe.toml --dry-run");
        assert!(matches!(out.status.code(), Some(0 | 2)), "{out:?}");
        refused += u32::from(!out.status.success());
    }
    assert!(refused > 100, "{refused}");
}

#[test]
fn adapters_by_options() {
    let folder = models();
    let at = folder.path();
    for (name, x) in [("one", 1.0), ("two", 2.0)] {
        let factors = model([
            ("q.lora_A.weight", Stored::f32(&[x, x]).shaped(&[1, 2])),
            ("q.lora_B.weight", Stored::f32(&[x, x]).shaped(&[2, 1])),
        ]);
        support::save(&at.join(name), &factors);
    }
    support::save(&at.join("base"), &model([("q.weight", Stored::f32(&[0.0; 4]).shaped(&[2, 2]))]));
    let said = ok(at, "merge --method linear base base --adapter one --adapter two --weight 1,3 --alpha 1,2 --out m");
    assert!(said.starts_with("m: weights of 1 tensors"), "{said}");
    assert_eq!(support::load(&at.join("m"))["q.weight"].numbers(), [(1.0 + 3.0 * 2.0 * 4.0) / 4.0; 4]);
    let e = error(at, "merge --method linear base base --adapter one --out m");
    assert!(e.contains("--adapter is given 1 times for 2 models"), "{e}");
}

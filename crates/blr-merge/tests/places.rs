//! What stands where a model is read or written: files of other formats, what is no file, inputs as outputs.

mod support;

use blr_merge::{Destination, FileModel, Method, WeightFile, diff_files, merge_files};
use std::fs;
use std::path::{Path, PathBuf};
use support::{Stored, load, model, save};

fn quiet(_: u64, _: u64) {}

fn put(path: PathBuf, x: f32) -> PathBuf {
    save(&path, &model([("v", Stored::f32(&[x; 2])), ("w", Stored::f32(&[2.0 * x; 2]))]));
    path
}

fn average(models: &[&Path], out: impl Into<Destination>) -> Result<blr_merge::Merged, String> {
    let models: Vec<FileModel> = models.iter().map(|path| FileModel::new(*path)).collect();
    merge_files(Method::linear(), None, &models, out, &mut quiet).map_err(|e| e.to_string())
}

/// By their first bytes, whatever they are called. (PyTorch's .pt: files.rs.)
#[test]
fn other_formats_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n";
    for (bytes, says) in [
        (&b"PK\x03\x04\0\0\x08\x08 and so on"[..], "a zip archive"),
        (b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "a zip archive"),
        (b"\x80\x02}q\0X\x06\0\0\0weight", "a Python pickle"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94", "a Python pickle"),
        (b"GGUF\x03\0\0\0\x23\x01\0\0\0\0\0\0", "a GGUF file"),
        // 123 tensors, so that there is a brace where a header begins.
        (b"GGUF\x03\0\0\0{\0\0\0\0\0\0\0", "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "an HDF5 file"),
        (b"\x93NUMPY\x01\0v\0{'descr': '<f4'", "a numpy array"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcb\x48", "compressed by gzip: unpack"),
        (lfs.as_bytes(), "git lfs pull"),
        (b"<!DOCTYPE html><html><head>", "a web page"),
        (b"\n  <html lang=\"en\">", "a web page"),
        (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "a web page"),
        (b"<HTML><BODY>404", "a web page"),
    ] {
        fs::write(&path, bytes).unwrap();
        let e = WeightFile::open(&path).unwrap_err().to_string();
        assert!(e.contains(says.split(':').next().unwrap()) && e.contains(says.rsplit(": ").next().unwrap()), "{e}");
        assert!(e.contains("model.safetensors") && e.contains("not a safetensors file: ") && e.len() < 400, "{e}");
    }
    // Not named is what is none of these, though it begins like one: a header of 35615 bytes is no gzip.
    for (bytes, says) in [(&b"whatever it is"[..], "claims a header"), (b"", "it has 0 bytes"), (b"PK\x03", "3 bytes")]
    {
        fs::write(&path, bytes).unwrap();
        let e = WeightFile::open(&path).unwrap_err().to_string();
        assert!(e.contains("is not a whole safetensors file") && e.contains(says), "{e}");
    }
    let mut header = br#"{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#.to_vec();
    for length in [0x0280u16, 0x8b1f] {
        header.resize(usize::from(length), b' ');
        fs::write(&path, [&u64::from(length).to_le_bytes()[..], &header].concat()).unwrap();
        assert_eq!(WeightFile::open(&path).unwrap().tensors().len(), 1);
    }
}

/// Nothing is read for ever, and nobody waits for the other end of a pipe.
#[cfg(unix)]
#[test]
fn only_regular_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for pipe in ["pipe", "pipe.json"] {
        assert!(std::process::Command::new("mkfifo").arg(at(pipe)).status().unwrap().success());
    }
    std::os::unix::fs::symlink("/dev/zero", at("zero.index.json")).unwrap();
    std::os::unix::fs::symlink("pipe", at("link")).unwrap();
    let good = put(at("good"), 1.0);
    for (path, says) in [
        (at("pipe"), "is a pipe: expected a regular file"),
        (at("pipe.json"), "is a pipe"),
        (at("link"), "is a pipe"),
        (at("zero.index.json"), "is a device"),
        ("/dev/zero".into(), "is a device"),
        ("/dev/stdin".into(), "/dev/stdin"),
    ] {
        let e = WeightFile::open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
        let fisher = FileModel::new(&good).curvature(&path);
        assert!(merge_files(Method::Fisher, None, &[fisher], at("out"), &mut quiet).is_err());
        average(&[&good, &path], at("out")).unwrap_err();
        diff_files(&good, &path).unwrap_err();
    }
    // Also if an index says so.
    fs::create_dir(at("model")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(at("model/shard")).status().unwrap().success());
    let index = at("model").join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map": {"w": "shard"}}"#).unwrap();
    assert!(WeightFile::open(at("model")).unwrap_err().to_string().contains("is a pipe"));
    fs::remove_file(&index).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&index).status().unwrap().success());
    assert!(WeightFile::open(at("model")).unwrap_err().to_string().contains("is a pipe"));
}

/// A folder where a download has left an older index beside the file, or the other way round.
#[test]
fn a_folder_with_two_models_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, shards) = (put(at("a"), 1.0), at("shards"));
    average(&[&a], Destination::shards(&shards, 8)).unwrap();
    let single = shards.join("model.safetensors");
    put(single.clone(), 3.0);
    let e = WeightFile::open(&shards).unwrap_err().to_string();
    assert!(e.contains("shards: ") && e.contains("give the path of the one you mean"), "{e}");
    average(&[&shards, &a], at("out")).unwrap_err();
    // Each by its path.
    let index = shards.join("model.safetensors.index.json");
    average(&[&single], at("out")).unwrap();
    assert_eq!(load(&at("out"))["v"].numbers(), [3.0; 2]);
    average(&[&index], at("out")).unwrap();
    assert_eq!(load(&at("out"))["v"].numbers(), [1.0; 2]);
    // An index of the one file says the same as the file.
    fs::write(&index, r#"{"weight_map": {"v": "model.safetensors", "w": "model.safetensors"}}"#).unwrap();
    average(&[&shards], at("out")).unwrap();
    assert_eq!(load(&at("out"))["v"].numbers(), [3.0; 2]);
    fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    assert!(WeightFile::open(&index).unwrap_err().to_string().contains("lists no tensor"));
}

/// Read before it is replaced, a whole model; but a part of one is not replaced.
#[test]
fn an_input_as_output() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (a, b, shards) = (put(at("a"), 1.0), put(at("b"), 3.0), at("shards"));
    average(&[&a], Destination::shards(&shards, 8)).unwrap();
    average(&[&a, &b], &a).unwrap();
    assert_eq!(load(&a)["v"].numbers(), [2.0; 2]);
    average(&[&b, &a], &a).unwrap();
    assert_eq!(load(&a)["v"].numbers(), [2.5; 2]);
    let shard = shards.join("model-00001-of-00002.safetensors");
    let before = fs::read(&shard).unwrap();
    for model in [&shards, &shards.join("model.safetensors.index.json")] {
        let e = average(&[model, &a], &shard).unwrap_err();
        assert!(e.contains("is a shard of ") && e.contains("choose another name"), "{e}");
    }
    assert_eq!((fs::read(&shard).unwrap(), fs::read_dir(&shards).unwrap().count()), (before, 3));
    let e = average(&[&shards, &a], Destination::shards(&shards, 8)).unwrap_err();
    assert!(e.contains("new or empty folder"), "{e}");
}

/// What cannot be written is said before anything is read: here there is nothing to read.
#[test]
fn destinations_are_looked_at_first() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let none = at("no such model");
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("file"), "old").unwrap();
    let long = "n".repeat(256);
    for out in [at("folder"), at("none/out"), at("file/out"), at(&long), "/".into(), "".into()] {
        let e = average(&[&none], &out).unwrap_err();
        assert!(e.contains("cannot be written") && !e.contains("no such model"), "{e}");
    }
    let e = average(&[&none], Destination::shards(at("file"), 8)).unwrap_err();
    assert!(e.contains("new or empty folder"), "{e}");
    let e = average(&[&none], at("out")).unwrap_err();
    assert!(e.contains("no such model: cannot be read"), "{e}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

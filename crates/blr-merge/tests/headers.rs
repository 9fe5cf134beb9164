//! Headers of safetensors files that lie: an error or a whole file, and never more memory than the file's size accounts
//! for. Alone in its binary, for the allocator counts for the process.

use blr_merge::{Error, Result, StoredTensor, WeightFile, diff_files};
use peak_alloc::PeakAlloc;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// Counts what Rust allocates. A block that moves to grow counts twice meanwhile.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Buffers, paths and messages, in bytes; a table of metadata as long as it may be has its own.
const CONSTANT: usize = 1 << 14;
const METADATA: usize = 1 << 20;
/// What a file's size is multiplied by at most: a dimension takes two bytes of text and eight of memory.
const FACTOR: usize = 4;

/// Opens a file; with the most bytes that were allocated at a time on the way, what is kept of it included.
fn open(path: &Path, bytes: &[u8]) -> (Result<WeightFile>, usize) {
    // Some file systems wait for the disk where a file is emptied and written again.
    _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let file = WeightFile::open(path);
    (file, ALLOCATOR.peak_usage() - before)
}

/// Both in one, for nothing else may allocate meanwhile: not another test, not the threads that read tensors.
#[test]
fn headers_give_errors_or_whole_files_in_bounded_memory() {
    large_headers_take_no_more_than_their_size_accounts_for();
    mutated_headers_give_errors();
}

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// `{"0":…,"1":…}` with so many names.
fn entries(count: usize, value: impl Fn(usize) -> String) -> String {
    let mut text = String::from("{");
    for i in 0..count {
        let comma = if i == 0 { "" } else { "," };
        write!(text, "{comma}\"{i:x}\":{}", value(i)).unwrap();
    }
    text + "}"
}

/// Files of about a megabyte that a parser could make many of.
fn large_headers_take_no_more_than_their_size_accounts_for() {
    const EMPTY: &str = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large");
    let million = 1 << 20;
    let long = "a".repeat(million);
    let quoted = format!("\"{long}\"");
    let tensor = |shape: &str| format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[0,1]}}}}"#);
    let dimensions = |first: usize, n: usize| format!("[{first}{}]", ",1".repeat(n - 1));
    let metadata = |entries: &str| format!(r#"{{"__metadata__":{entries},"a":{EMPTY}}}"#);
    let many = EMPTY.replace("[0]", &dimensions(0, 64));
    let twice = format!("{{\"a\":{EMPTY}{}}}", format!(",\"a\":{EMPTY}").repeat(20_000));
    let large = tensor(&format!("[{million}]")).replace("[0,1]", &format!("[0,{million}]"));
    let unused =
        tensor("[1]").replace(":\"U8\"", &format!(":\"U8\",\"x\":{}", entries(100_000, |_| "[1,{}]".to_owned())));
    let fails = Err;
    for (what, bytes, expected) in [
        ("many tensors", file(&entries(20_000, |_| EMPTY.to_owned()), 0), Ok(20_000)),
        ("many tensors of 64 dimensions", file(&entries(5000, |_| many.clone()), 0), Ok(5000)),
        ("a large tensor", file(&large, million), Ok(1)),
        ("a million dimensions", file(&tensor(&dimensions(1, million)), 1), fails("more than 64 dimensions")),
        ("2⁶³ elements", file(&tensor("[9223372036854775808]"), 1), fails("has 1 bytes")),
        ("2⁸⁰ elements", file(&tensor("[1099511627776,1099511627776]"), 1), fails("has 1 bytes")),
        ("nested lists for a shape", file(&tensor(&"[".repeat(million)), 1), fails("a whole number")),
        ("a text for a shape", file(&tensor(&quoted), 1), fails("should be a shape")),
        ("a text for a dimension", file(&tensor(&format!("[{quoted}]")), 1), fails("should be a whole number")),
        ("an unknown kind of number", file(&tensor("[1]").replace("U8", &long), 1), fails("unknown kind")),
        ("nested lists without use", file(&r#"{"a":{"x":["#.replace('[', &"[".repeat(million)), 0), fails("EOF")),
        ("many entries without use", file(&unused, 1), Ok(1)),
        ("a long name", file(&tensor("[1]").replace("\"a\"", &quoted), 1), fails("a name of 1048576 bytes")),
        ("the same tensor many times", file(&twice, 0), fails("`a` is described twice")),
        ("long metadata", file(&metadata(&format!("{{\"a\":{quoted}}}")), 0), Ok(1)),
        ("many metadata", file(&metadata(&entries(4096, |_| "\"\"".to_owned())), 0), Ok(1)),
        ("too many metadata", file(&metadata(&entries(100_000, |_| "\"\"".to_owned())), 0), fails("more than 4096")),
        ("a text for metadata", file(&metadata(&quoted), 0), fails("should be a map of texts")),
        ("a text and nothing else", file(&quoted, 0), fails("should be tensors by name")),
        ("a header of 2⁶³ bytes", [vec![0, 0, 0, 0, 0, 0, 0, 128], vec![b' '; 1 << 16]].concat(), fails("claims")),
    ] {
        let (found, peak) = open(&path, &bytes);
        println!("{:4.2} of {:7} bytes: {what}", peak as f64 / bytes.len() as f64, bytes.len());
        match (&found, expected) {
            (Ok(file), Ok(tensors)) => assert_eq!(file.tensors().len(), tensors, "{what}"),
            (Err(Error::File { problem, .. }), Err(says)) => assert!(problem.contains(says), "{what}: {problem}"),
            other => panic!("{what}: {other:?}"),
        }
        let constant = if what.contains("metadata") { METADATA } else { CONSTANT };
        assert!(peak < FACTOR * bytes.len() + constant, "{what}: {peak} bytes allocated for {}", bytes.len());
    }
}

/// 10,000 files whose header was changed or cut off: each is an error, or is still a whole file whose tensors can all
/// be read.
fn mutated_headers_give_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mutated");
    let header = r#"{"layer.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]},
        "layer.bias":{"dtype":"BF16","shape":[2],"data_offsets":[32,36]},"steps":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},
        "empty":{"dtype":"F32","shape":[0,3],"data_offsets":[36,36]},"__metadata__":{"format":"pt"}}"#;
    let original = file(header, 36);
    let (mut refused, mut whole, mut most) = (0, Vec::new(), 0);
    for bytes in mutations(&original, 10_000) {
        let (found, peak) = open(&path, &bytes);
        assert!(peak < FACTOR * bytes.len() + CONSTANT, "{peak} bytes for {}", bytes.len());
        most = most.max(peak);
        match found {
            Err(Error::File { path: named, .. }) => {
                assert_eq!(named, path);
                refused += 1;
            }
            Err(e) => panic!("{e}"),
            Ok(file) => {
                let described: u64 = file.tensors().values().map(StoredTensor::bytes).sum();
                assert!(described < bytes.len() as u64);
                whole.push(bytes);
            }
        }
    }
    println!("{most} bytes at most, for about {}", original.len());
    // Both happen: neither is everything refused nor everything believed.
    assert!(refused > 7000 && whole.len() > 300, "{refused} {}", whole.len());
    // Every byte can be read.
    for bytes in whole {
        let _ = open(&path, &bytes).0.unwrap();
        assert!(diff_files(&path, &path).unwrap().is_empty());
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

const PIECES: [&[u8]; 18] = [
    b"18446744073709551615",
    b"-1",
    b"1e300",
    b"0",
    b"[]",
    b"{",
    b"}",
    b"null",
    b"\"F64\"",
    b"\"BOOL\"",
    b"\"F4\"",
    b"[4611686018427387904,4]",
    b"data_offsets",
    b",",
    b"\\u0000",
    b"\xff\xfe",
    b"[[[[[[[[",
    b"99999999999999999999999",
];

/// So many files like a given one, with bytes changed, put in or cut out up to the end of the header; always the same
/// ones.
fn mutations(original: &[u8], count: usize) -> impl Iterator<Item = Vec<u8>> {
    let header = 8 + u64::from_le_bytes(original[..8].try_into().unwrap()) as usize;
    let mut random = Random(0x5eed);
    (0..count).map(move |round| {
        let mut bytes = original.to_vec();
        match round % 6 {
            0 => bytes.truncate(random.below(original.len())),
            1 => (0..=random.below(4)).for_each(|_| bytes[random.below(header)] = random.below(256) as u8),
            2 => bytes[random.below(header)] ^= 1 << random.below(8),
            3 => {
                let (at, piece) = (8 + random.below(header - 8), PIECES[random.below(PIECES.len())]);
                let end = (at + random.below(12)).min(header);
                bytes.splice(at..end, piece.iter().copied());
                // With a length that fits, so that the text itself is looked at.
                let length = (bytes.len() - (original.len() - header) - 8) as u64;
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
            4 => {
                let length = [0, 1, header as u64, u64::MAX, u64::MAX / 2, 1 << 40, 100_000_000, 99_999_999];
                let length = length[random.below(8)].wrapping_add(random.below(3) as u64);
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
            _ => {
                let at = 8 + random.below(header - 8);
                let end = (at + 1 + random.below(30)).min(header);
                bytes.drain(at..end);
                let length = (header - 8 - (end - at)) as u64;
                bytes[..8].copy_from_slice(&length.to_le_bytes());
            }
        }
        bytes
    })
}

//! The header of a safetensors file: which tensors there are, and where.
//!
//! It may come from anyone, so it is believed only where it agrees with the length of the file, and whatever it says,
//! reading it takes memory in proportion to its length. It is parsed as a stream, straight into what is kept of it,
//! without the text or a tree of JSON values in between. No number in it reserves memory, and entries without a use are
//! skipped.

use super::convert::is_floating;
use super::format;
use crate::{Error, Result};
use safetensors::Dtype;
use serde::de::value::StrDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;

/// Bytes of the longest header that the format allows.
pub(super) const LONGEST: u64 = 100_000_000;
/// The entry of a header that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";
/// Bytes before the header, which hold its length.
const PREFIX: u64 = 8;
/// Bytes that are enough to tell other formats.
const BEGINNING: u64 = 64;
/// As many as libtorch can reduce over, and twice as many as older numpy allows. In a header a dimension takes two
/// bytes, here eight, so their number must not be up to the file.
const MOST_DIMENSIONS: usize = 64;
/// Bytes of the longest tensor's name; real ones have a hundred. Only texts in the metadata may be longer.
const LONGEST_NAME: usize = 4096;
/// Most entries of metadata: an empty one has six bytes in the file and fifty in memory.
const MOST_METADATA: usize = 4096;
/// Characters of a parser's message that are passed on. It may quote the file, and be as long as it.
const LONGEST_MESSAGE: usize = 300;

/// A tensor of a [`WeightFile`](super::WeightFile).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Kind of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Index of the shard that it is in.
    pub(super) shard: usize,
    /// Where it begins, in bytes from the beginning of the shard.
    pub(super) at: u64,
    pub(super) bytes: u64,
}

impl StoredTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its size in the file, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is of a kind that merges compute with: F32, F64, BF16, F16.
    pub fn is_floating(&self) -> bool {
        is_floating(self.dtype)
    }
}

/// What a header says.
#[derive(Default)]
pub(super) struct Header {
    /// By name; `at` counts from the beginning of the file.
    pub tensors: BTreeMap<String, StoredTensor>,
    pub metadata: HashMap<String, String>,
}

/// Reads and checks the header of a file whose tensors will be those of shard number `shard`.
pub(super) fn read(path: &Path, file: &File, shard: usize) -> Result<Header> {
    let invalid = |problem: String| Error::file(path, format_args!("is not a whole safetensors file: {problem}"));
    let unreadable = |e: std::io::Error| Error::file(path, format_args!("cannot be read: {e}"));
    let total = file.metadata().map_err(unreadable)?.len();
    let mut file = BufReader::new(file);
    let mut beginning = Vec::new();
    file.by_ref().take(BEGINNING).read_to_end(&mut beginning).map_err(unreadable)?;
    let prefix = beginning.first_chunk::<{ PREFIX as usize }>();
    let length = prefix.map(|prefix| u64::from_le_bytes(*prefix));
    let fits = length.is_some_and(|length| length <= LONGEST.min(total.saturating_sub(PREFIX)));
    // A header begins with a brace. Other formats have lengths that do not fit, or something else in this place.
    if !(fits && beginning.get(PREFIX as usize) == Some(&b'{'))
        && let Some(other) = format::named(&beginning)
    {
        return Err(Error::file(path, other));
    }
    let Some(rest) = total.checked_sub(PREFIX) else {
        return Err(invalid(format!("it has {total} bytes, fewer than the length of its header takes")));
    };
    let length = length.unwrap_or(u64::MAX);
    if !fits {
        return Err(invalid(format!("it claims a header of {length} bytes, of which {rest} are there")));
    }
    let file = Cursor::new(beginning.split_off(PREFIX as usize)).chain(file);
    let mut parser = serde_json::Deserializer::from_reader(file.take(length));
    let parsed = Header::deserialize(&mut parser).and_then(|header| parser.end().map(|()| header));
    let mut header = parsed.map_err(|e| {
        let mut message = e.to_string();
        if let Some((end, _)) = message.char_indices().nth(LONGEST_MESSAGE) {
            message.truncate(end);
            message += "…";
        }
        invalid(message)
    })?;
    let end = check(&header.tensors).map_err(invalid)?;
    if end != rest - length {
        return Err(invalid(format!("its header describes {end} bytes of tensors and {} are there", rest - length)));
    }
    for t in header.tensors.values_mut() {
        t.shard = shard;
        t.at += PREFIX + length;
    }
    Ok(header)
}

/// Errors if the format has no place for a tensor of this name, or this crate would not read it.
pub(super) fn check_name(name: &str) -> std::result::Result<(), String> {
    if name == METADATA {
        return Err("safetensors files keep this name for themselves; rename it to save it".to_owned());
    }
    if name.len() > LONGEST_NAME {
        return Err(format!("its name has {} bytes: expected {LONGEST_NAME} at most", name.len()));
    }
    Ok(())
}

/// Checks that every tensor has the bytes that its shape needs, and that they lie one after the other without gaps.
/// Returns where the last one ends.
fn check(tensors: &BTreeMap<String, StoredTensor>) -> std::result::Result<u64, String> {
    for (name, t) in tensors {
        let elements = t.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let bits = elements.and_then(|n| n.checked_mul(t.dtype.bitsize()));
        if bits.is_none_or(|bits| bits % 8 != 0 || (bits / 8) as u64 != t.bytes) {
            return Err(format!("tensor `{name}` has {} bytes for {:?} {:?}", t.bytes, t.dtype, t.shape));
        }
    }
    let mut places: Vec<(u64, u64)> = tensors.values().map(|t| (t.at, t.at + t.bytes)).collect();
    places.sort_unstable();
    places.into_iter().try_fold(0, |end, (from, to)| {
        let gap = || format!("a tensor begins at byte {from} of the data, where another one ends at {end}");
        if from == end { Ok(to) } else { Err(gap()) }
    })
}

/// Implements [`Deserialize`] by the given methods of a visitor. Whatever else the file has in this place is an error
/// that says what was expected.
macro_rules! by_visitor {
    ($type:ty, $expects:literal, $($method:tt)*) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
                struct This;
                impl<'de> Visitor<'de> for This {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expects)
                    }
                    $($method)*
                }
                d.deserialize_any(This)
            }
        }
    };
}

/// A visitor's method that refuses texts. serde's own would quote them in its error, and they may be as long as the
/// file.
macro_rules! no_text {
    () => {
        fn visit_str<E: de::Error>(self, _: &str) -> std::result::Result<Self::Value, E> {
            Err(E::custom(format_args!("a text where there should be {}", &self as &dyn de::Expected)))
        }
    };
}

struct Name(String);
struct Text(String);
struct Kind(Dtype);
struct Count(u64);
struct Shape(Vec<usize>);
struct Entries(HashMap<String, String>);

by_visitor! { Name, "a name",
    fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<Name, E> {
        if name.len() > LONGEST_NAME {
            return Err(E::custom(format_args!("a name of {} bytes: expected {LONGEST_NAME} at most", name.len())));
        }
        Ok(Name(name.to_owned()))
    }
}

by_visitor! { Text, "a text",
    fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Text, E> {
        Ok(Text(text.to_owned()))
    }
}

by_visitor! { Kind, "a kind of number",
    fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<Kind, E> {
        // serde quotes an unknown name in its error, so only names that may be known are shown to it.
        let known = name.len() < 16;
        let dtype = known.then(|| Dtype::deserialize(StrDeserializer::<E>::new(name)));
        dtype.ok_or_else(|| E::custom("an unknown kind of number"))?.map(Kind)
    }
}

by_visitor! { Count, "a whole number ≥ 0",
    no_text! {}
    fn visit_u64<E: de::Error>(self, n: u64) -> std::result::Result<Count, E> {
        Ok(Count(n))
    }
}

by_visitor! { Shape, "a shape",
    no_text! {}
    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> std::result::Result<Shape, A::Error> {
        // Not a vector that grows, which for a moment is in memory twice.
        let (mut shape, mut n) = ([0; MOST_DIMENSIONS], 0);
        while let Some(Count(size)) = sequence.next_element()? {
            let too_many = || de::Error::custom(format_args!("more than {MOST_DIMENSIONS} dimensions"));
            *shape.get_mut(n).ok_or_else(too_many)? = size as usize;
            n += 1;
        }
        Ok(Shape(shape[..n].to_vec()))
    }
}

by_visitor! { Entries, "a map of texts",
    no_text! {}
    fn visit_unit<E: de::Error>(self) -> std::result::Result<Entries, E> {
        Ok(Entries(HashMap::new()))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
        let mut entries = HashMap::new();
        while let Some((Text(name), Text(text))) = map.next_entry()? {
            entries.insert(name, text);
            if entries.len() > MOST_METADATA {
                return Err(de::Error::custom(format_args!("more than {MOST_METADATA} entries of metadata")));
            }
        }
        Ok(Entries(entries))
    }
}

by_visitor! { Description, "the kind, shape and place of a tensor",
    no_text! {}
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Description, A::Error> {
        Ok(Description(Fields::deserialize(de::value::MapAccessDeserializer::new(map))?))
    }
}

struct Description(Fields);

#[derive(serde::Deserialize)]
struct Fields {
    dtype: Kind,
    shape: Shape,
    data_offsets: [Count; 2],
}

by_visitor! { Header, "tensors by name",
    no_text! {}
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let mut header = Header::default();
        while let Some(Name(name)) = map.next_key()? {
            if name == METADATA {
                Entries(header.metadata) = map.next_value()?;
                continue;
            }
            let Description(Fields { dtype, shape, data_offsets: [Count(at), Count(end)] }) = map.next_value()?;
            let Some(bytes) = end.checked_sub(at) else {
                return Err(de::Error::custom(format_args!("tensor `{name}` ends before it begins")));
            };
            if header.tensors.contains_key(&name) {
                return Err(de::Error::custom(format_args!("tensor `{name}` is described twice")));
            }
            header.tensors.insert(name, StoredTensor { dtype: dtype.0, shape: shape.0, shard: 0, at, bytes });
        }
        Ok(header)
    }
}

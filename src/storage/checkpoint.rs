//! Named tensors with a description in one safetensors file, replaced atomically.
//!
//! The files that this crate writes whole: checkpoints, posteriors, memories. What each of them holds is in its own
//! module.

use crate::{Error, Result};
use blr_merge::storage::{DESCRIPTION, other_format, replace};
use safetensors::{Dtype, SafeTensors, View, tensor::serialize_to_file};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Of the description. What `content` holds is known by the form.
const VERSION: u32 = 1;

/// The description: what the file is, and what its writer has to say besides the tensors.
#[derive(Serialize, Deserialize)]
struct Description<C> {
    form: String,
    version: u32,
    content: C,
}

/// A contiguous CPU tensor on its way to a file.
struct Stored(Tensor, Vec<usize>);

impl Stored {
    fn new(t: &Tensor) -> Self {
        // Made contiguous once; tch would do it again in every call of `data`.
        let t = t.detach().to_device(Device::Cpu).contiguous();
        let shape = t.size().iter().map(|n| *n as usize).collect();
        Stored(t, shape)
    }
}

/// The kinds that states and posteriors have.
fn dtype(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::Float => Some(Dtype::F32),
        Kind::Double => Some(Dtype::F64),
        _ => None,
    }
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        dtype(self.0.kind()).expect("save() admits only kinds that have a dtype")
    }
    fn shape(&self) -> &[usize] {
        &self.1
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.0.copy_data_u8(&mut bytes, self.0.numel());
        Cow::Owned(bytes)
    }
    fn data_len(&self) -> usize {
        self.0.numel() * self.0.kind().elt_size_in_bytes()
    }
}

/// Writes tensors (f32, f64) and `content` as a file of this form. It takes the place of an old file only once it is
/// whole.
pub(crate) fn save(path: &Path, form: &str, tensors: &[(String, Tensor)], content: &impl Serialize) -> Result<()> {
    let error = |problem: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {problem}"));
    // Before the draft is made: a kind that cannot be saved leaves nothing behind on the disk.
    if let Some((name, t)) = tensors.iter().find(|(_, t)| dtype(t.kind()).is_none()) {
        return Err(Error::parameter(name, format!("kind {:?} cannot be saved: expected f32 or f64", t.kind())));
    }
    let description = Description { form: form.to_owned(), version: VERSION, content };
    let description = serde_json::to_string(&description).map_err(|e| error(&e))?;
    let metadata = HashMap::from([(DESCRIPTION.to_owned(), description)]);
    // Copied from the device first, so that the draft is open only while it is written.
    let stored: Vec<Stored> = tensors.iter().map(|(_, t)| Stored::new(t)).collect();
    replace(path, |draft| {
        // serialize_to_file makes a private file; ours should be as readable as the user's other files.
        let readable = || fs::File::create(draft)?.metadata().map(|m| m.permissions());
        let permissions = readable().map_err(|e| error(&e))?;
        let named = tensors.iter().map(|(name, _)| name.as_str()).zip(&stored);
        serialize_to_file(named, Some(metadata), draft).map_err(|e| error(&e))?;
        fs::set_permissions(draft, permissions).map_err(|e| error(&e))
    })
}

/// Reads what [`save`] wrote in this form: tensors on the CPU, and the content.
pub(crate) fn load<C: DeserializeOwned>(path: &Path, form: &str) -> Result<(BTreeMap<String, Tensor>, C)> {
    let error = |problem: &dyn std::fmt::Display| Error::file(path, problem);
    let bytes = fs::read(path).map_err(|e| error(&format!("cannot be read: {e}")))?;
    if let Some(other) = other_format(&bytes) {
        return Err(error(&other));
    }
    let invalid = |e: &dyn std::fmt::Display| error(&format!("is not a whole safetensors file: {e}"));
    // The description before the tensors: a file of another form should be named as one, whatever its tensors are.
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(&e))?;
    let description = header
        .metadata()
        .as_ref()
        .and_then(|m| m.get(DESCRIPTION))
        .ok_or_else(|| error(&"holds tensors, but no description by tch-blr; it was written by something else"))?;
    let damaged = |e| error(&format!("has a description that cannot be read: {e}"));
    // The content stays unread until the form is known: that of another form would fail with a message about fields.
    let found: Description<serde_json::Value> = serde_json::from_str(description).map_err(damaged)?;
    if (found.form.as_str(), found.version) != (form, VERSION) {
        let Description { form: other, version, .. } = found;
        return Err(error(&format!("holds `{other}`, version {version}: expected `{form}`, version {VERSION}")));
    }
    let content = serde_json::from_value(found.content).map_err(damaged)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes).map_err(|e| invalid(&e))?.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            other => return Err(error(&format!("tensor `{name}` has kind {other:?}: expected F32 or F64"))),
        };
        let size: Vec<i64> = view.shape().iter().map(|n| *n as i64).collect();
        // Copies: the tensors must not borrow from `bytes`.
        let tensor = Tensor::f_from_data_size(view.data(), &size, kind)
            .map_err(|e| error(&format!("tensor `{name}` cannot be made: {}", Error::from(e))))?;
        tensors.insert(name.to_owned(), tensor);
    }
    Ok((tensors, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(x: f64) -> Vec<(String, Tensor)> {
        vec![
            ("a".to_owned(), Tensor::from_slice(&[x, 2.0]).reshape([2, 1])),
            ("empty".to_owned(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
            ("scalar".to_owned(), Tensor::from(x as f32)),
        ]
    }

    #[test]
    fn what_is_saved_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "test", &example(1.5), &0.1f64).unwrap();
        save(&path, "test", &example(2.5), &0.300_000_000_000_000_04_f64).unwrap();
        let (tensors, description) = load::<f64>(&path, "test").unwrap();
        assert_eq!(description, 0.300_000_000_000_000_04);
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "empty", "scalar"]);
        assert_eq!(tensors["a"], example(2.5)[0].1);
        assert_eq!((tensors["empty"].size(), tensors["scalar"].double_value(&[])), (vec![0, 3], 2.5));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a draft was left behind");
    }

    #[test]
    fn another_form_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "adam optimizer", &example(1.5), &0.1f64).unwrap();
        let e = load::<f64>(&path, "ivon optimizer").unwrap_err().to_string();
        assert!(e.contains("holds `adam optimizer`, version 1: expected `ivon optimizer`"), "{e}");
    }

    /// A file cut off at any byte is refused, and so is one whose header lies.
    #[test]
    fn broken_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "test", &example(1.5), &0.1f64).unwrap();
        let whole = fs::read(&path).unwrap();
        for n in 0..whole.len() {
            fs::write(&path, &whole[..n]).unwrap();
            let e = load::<f64>(&path, "test").unwrap_err().to_string();
            assert!(e.contains("x.safetensors"), "{e}");
        }
        for header in [
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#,
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            r#"{"__metadata__":{"tch_blr":"{}"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        ] {
            let header = header.replace("DESC", r#"{\"form\":\"test\",\"version\":1,\"content\":1}"#);
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 8]);
            if header.contains("[0,4]") {
                bytes.truncate(bytes.len() - 4);
            }
            fs::write(&path, &bytes).unwrap();
            load::<f64>(&path, "test").unwrap_err();
        }
        fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        load::<f64>(&path, "test").unwrap_err();
    }

    #[test]
    fn a_failed_save_leaves_the_old_file_and_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "test", &example(1.5), &0.1f64).unwrap();
        let before = fs::read(&path).unwrap();
        let integers = [("i".to_owned(), Tensor::from_slice(&[1i64]))];
        assert!(save(&path, "test", &integers, &0.1f64).unwrap_err().to_string().contains("`i`"));
        assert!(save(&dir.path().join("no/folder"), "test", &example(1.0), &0.1f64).is_err());
        assert!(save(dir.path(), "test", &example(1.0), &0.1f64).is_err());
        assert_eq!((fs::read(&path).unwrap(), fs::read_dir(dir.path()).unwrap().count()), (before, 1));
    }
}

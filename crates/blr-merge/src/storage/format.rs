//! Files that people take for safetensors files, told by their first bytes.

/// How weights become a safetensors file.
const SAVE: &str = "save the weights under a name that ends in .safetensors (tch: VarStore::save; Python: \
                    safetensors.torch.save_file)";

/// What a file is that begins so, and what to do about it.
pub(super) fn named(beginning: &[u8]) -> Option<String> {
    let (what, remedy) = match beginning {
        [b'P', b'K', 3 | 5, 4 | 6, ..] => ("a zip archive, as tch's .ot and PyTorch's .pt are", SAVE),
        // Protocols 2 to 5; older ones have no mark.
        [0x80, 2..=5, ..] => ("a Python pickle, as PyTorch's .pt and .bin were before 1.6", SAVE),
        [b'G', b'G', b'U', b'F', ..] => ("a GGUF file, as llama.cpp has them", "take the weights that it was made of"),
        [0x89, b'H', b'D', b'F', ..] => ("an HDF5 file, as Keras has them", SAVE),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => ("a numpy array", SAVE),
        [0x1f, 0x8b, ..] => ("compressed by gzip", "unpack it first"),
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', b'h', b't', b't', b'p', ..] => {
            ("a pointer to a file in Git LFS", "fetch the file with `git lfs pull`")
        }
        _ => {
            let text = beginning.trim_ascii_start().to_ascii_lowercase();
            let page = [b"<!doctype".as_slice(), b"<html", b"<?xml"].iter().any(|tag| text.starts_with(tag));
            // As a server answers that has no such file, or wants a login.
            page.then_some(("a web page", "download the file itself"))?
        }
    };
    Some(format!("is {what}, and not a safetensors file: {remedy}"))
}

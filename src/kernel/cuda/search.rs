//! Where NVRTC, CUDA's compiler at run time, may be. libtorch brings one of its own, which fits it and the driver that
//! it needs, but in a folder that the dynamic linker does not search: beside its libraries (the archives), or in the
//! packages of NVIDIA beside it (the wheels of PyTorch).

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// Names the library, instead of all that is searched otherwise.
pub(super) const VARIABLE: &str = "TCH_BLR_NVRTC";

/// Names and places of an installed CUDA; names are for the dynamic linker to find.
const SYSTEM: [&str; 6] = [
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so",
    "/usr/local/cuda/lib64/libnvrtc.so",
    "/usr/local/cuda/lib/libnvrtc.so",
    "/opt/cuda/lib64/libnvrtc.so",
];

/// Paths to try, in this order: that of [`VARIABLE`] alone; what the process has loaded already; libtorch's; the
/// system's. `maps` is the process's list of mapped files.
pub(super) fn candidates(maps: &str, variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    if let Some(path) = variable(VARIABLE) {
        return vec![path.into()];
    }
    let mapped: Vec<&Path> = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..]))).collect();
    let mut found: Vec<PathBuf> = mapped.iter().filter(|p| is_nvrtc(&name(p))).map(|p| p.to_path_buf()).collect();
    let libtorch = mapped.iter().find(|p| name(p) == "libtorch_cpu.so").and_then(|p| p.parent().map(Path::to_owned));
    let given = variable("LIBTORCH").map(|folder| Path::new(&folder).join("lib"));
    for folder in [libtorch, given].into_iter().flatten() {
        found.extend(beside(&folder));
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(&variable);
    found.extend(toolkits.map(|folder| Path::new(&folder).join("lib64/libnvrtc.so")));
    found.extend(SYSTEM.map(PathBuf::from));
    let mut seen = Vec::new();
    found.retain(|path| {
        !seen.contains(path) && {
            seen.push(path.clone());
            true
        }
    });
    found
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Its other parts, and the smaller build beside it, have names that begin likewise.
fn is_nvrtc(name: &str) -> bool {
    name.starts_with("libnvrtc") && name.contains(".so") && !name.contains("builtins") && !name.contains(".alt.")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Those of a libtorch: first the one that it is linked to, then the newest.
fn beside(libtorch: &Path) -> Vec<PathBuf> {
    let mut found = files(libtorch);
    // LIBRARIES/../.. is `site-packages`.
    if let Some(packages) = libtorch.parent().and_then(Path::parent) {
        found.extend(files(&packages.join("nvidia")).iter().flat_map(|package| files(&package.join("lib"))));
    }
    found.retain(|path| is_nvrtc(&name(path)));
    let wanted = linked(&libtorch.join("libcaffe2_nvrtc.so"));
    found.sort_by_key(|path| (wanted.as_ref() == Some(&name(path)), name(path)));
    found.reverse();
    found
}

/// The name by which a library asks for NVRTC. The part of libtorch that is linked to it has some kilobytes.
fn linked(library: &Path) -> Option<String> {
    let bytes = fs::read(library).ok()?;
    let strings = bytes.split(|b| *b == 0).filter_map(|s| str::from_utf8(s).ok());
    strings.filter(|s| is_nvrtc(s)).map(str::to_owned).next()
}

/// The rest of the compiler, which it asks the dynamic linker for by name, without saying where.
pub(super) fn builtins(nvrtc: &Path) -> Vec<PathBuf> {
    let mut found = nvrtc.parent().map(files).unwrap_or_default();
    found.retain(|path| name(path).starts_with("libnvrtc-builtins") && !name(path).contains(".alt."));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files, whose contents are their names.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        root
    }

    fn maps(paths: &[PathBuf]) -> String {
        let line = |p: &PathBuf| format!("7f0000000000-7f0000001000 r-xp 00000000 fe:00 1234        {}\n", p.display());
        let own =
            "55d000000000-55d000001000 rw-p 00000000 00:00 0   [heap]\n7f00-7f01 rw-p 00000000 00:00 0 \n".to_owned();
        own + &paths.iter().map(line).collect::<String>()
    }

    fn unset(_: &str) -> Option<OsString> {
        None
    }

    /// What is found before the system's, below `root`.
    fn found(root: &Path, maps: &str, variable: impl Fn(&str) -> Option<OsString>) -> Vec<String> {
        let mut all = candidates(maps, variable);
        assert_eq!(all.split_off(all.len() - SYSTEM.len()), SYSTEM.map(PathBuf::from));
        all.iter().map(|p| p.strip_prefix(root).unwrap_or(p).display().to_string()).collect()
    }

    #[test]
    fn beside_the_wheel_of_pytorch() {
        let root = tree(&[
            "site packages/torch/lib/libtorch_cpu.so",
            "site packages/nvidia/cu13/lib/libnvrtc.so.13",
            "site packages/nvidia/cu13/lib/libnvrtc.alt.so.13",
            "site packages/nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
            "site packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
            "site packages/nvidia/cudnn/lib/libcudnn.so.9",
        ]);
        let packages = root.path().join("site packages");
        let maps = maps(&[packages.join("torch/lib/libc10.so"), packages.join("torch/lib/libtorch_cpu.so")]);
        let newest = ["nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12"];
        assert_eq!(found(&packages, &maps, unset), newest);
        // What libtorch itself uses comes first, however many there are.
        fs::write(packages.join("torch/lib/libcaffe2_nvrtc.so"), b"\x7fELF\xff\0libcuda.so.1\0libnvrtc.so.12\0")
            .unwrap();
        assert_eq!(found(&packages, &maps, unset), [newest[1], newest[0]]);
        assert_eq!(builtins(&packages.join(newest[0])), [packages.join("nvidia/cu13/lib/libnvrtc-builtins.so.13.0")]);
        assert!(builtins(&packages.join(newest[1])).is_empty());
        assert!(builtins(Path::new("libnvrtc.so")).is_empty());
    }

    #[test]
    fn among_the_libraries_of_an_archive() {
        let root = tree(&[
            "libtorch/lib/libtorch_cpu.so",
            "libtorch/lib/libnvrtc-b51b459d.so.12",
            "libtorch/lib/libnvrtc-builtins.so.12.6",
        ]);
        let library = "libtorch/lib/libnvrtc-b51b459d.so.12";
        let maps = maps(&[root.path().join("libtorch/lib/libtorch_cpu.so")]);
        assert_eq!(found(root.path(), &maps, unset), [library]);
        // Where there is no list of mapped files, and once where there is.
        let given = |name: &str| (name == "LIBTORCH").then(|| root.path().join("libtorch").into());
        assert_eq!(found(root.path(), "", given), [library]);
        assert_eq!(found(root.path(), &maps, given), [library]);
    }

    #[test]
    fn what_is_loaded_already_comes_first_and_what_is_named_alone() {
        let root = tree(&["torch/lib/libtorch_cpu.so", "nvidia/cu13/lib/libnvrtc.so.13"]);
        let loaded = PathBuf::from("/elsewhere/libnvrtc.so.12");
        let maps = maps(&[root.path().join("torch/lib/libtorch_cpu.so"), loaded.clone(), loaded]);
        let both = ["/elsewhere/libnvrtc.so.12", "nvidia/cu13/lib/libnvrtc.so.13"];
        assert_eq!(found(root.path(), &maps, unset), both);
        let toolkit = |name: &str| (name == "CUDA_HOME").then(|| "/cuda".into());
        assert_eq!(found(root.path(), &maps, toolkit)[2..], ["/cuda/lib64/libnvrtc.so"]);
        let named = |name: &str| (name == VARIABLE).then(|| "/mine/libnvrtc.so".into());
        assert_eq!(candidates(&maps, named), [PathBuf::from("/mine/libnvrtc.so")]);
        assert!(found(root.path(), "", unset).is_empty());
    }
}

//! The data of the examples: IDX files, drawn digits, letters, mini-batches, moons.

use std::fs;
use std::io::Write;
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr_examples::batches::{Batches, Last, batches, subset};
use tch_blr_examples::digits::{Digits, PIXELS, letters, rotate90};
use tch_blr_examples::handwritten::{self, Forms};
use tch_blr_examples::moons::moons;
use tch_blr_examples::random::Rng;

fn idx(size: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, size.len() as u8];
    bytes.extend(size.iter().flat_map(|s| s.to_be_bytes()));
    bytes.extend(data);
    bytes
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn pixels(n: usize) -> Vec<u8> {
    (0..n * PIXELS).map(|i| (i % 256) as u8).collect()
}

/// A folder `mnist` with three training images (labels gzipped) and two test images (images gzipped).
fn small_mnist() -> tempfile::TempDir {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().join("mnist");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("train-images-idx3-ubyte"), idx(&[3, 28, 28], &pixels(3))).unwrap();
    fs::write(folder.join("train-labels-idx1-ubyte.gz"), gz(&idx(&[3], &[7, 0, 9]))).unwrap();
    fs::write(folder.join("t10k-images-idx3-ubyte.gz"), gz(&idx(&[2, 28, 28], &pixels(2)))).unwrap();
    fs::write(folder.join("t10k-labels-idx1-ubyte"), idx(&[2], &[1, 2])).unwrap();
    data
}

fn ints(t: &Tensor) -> Vec<i64> {
    Vec::try_from(t).unwrap()
}

/// The error of loading, which must be one line that names `file`.
fn error(data: &Path, file: &str) -> String {
    let text = Digits::load_from(Some(data)).unwrap_err().to_string();
    assert!(text.contains(file) && text.lines().count() == 1, "{text}");
    text
}

#[test]
fn idx_files_plain_and_gzipped() {
    let data = small_mnist();
    let d = Digits::load_from(Some(data.path())).unwrap();
    assert_eq!(d.source, "MNIST");
    assert_eq!((d.train_images.size(), d.test_images.size()), (vec![3, 784], vec![2, 784]));
    assert_eq!((ints(&d.train_labels), ints(&d.test_labels)), (vec![7, 0, 9], vec![1, 2]));
    assert_eq!((d.train_images.kind(), d.train_labels.kind()), (Kind::Float, Kind::Int64));
    assert_eq!(d.train_images.double_value(&[0, 255]), 1.0);
    assert_eq!(d.train_images.double_value(&[1, 0]), f64::from(((784 % 256) as f32) / 255.0));
}

#[test]
fn bad_idx_files_are_named() {
    let spoil = |file: &str, bytes: &[u8]| {
        let data = small_mnist();
        fs::write(data.path().join("mnist").join(file), bytes).unwrap();
        error(data.path(), file)
    };
    let images = "train-images-idx3-ubyte";
    let labels = "t10k-labels-idx1-ubyte";
    assert!(spoil(images, &idx(&[3, 28, 28], &pixels(2))).contains("truncated"));
    assert!(spoil(images, &idx(&[3, 28, 28], &pixels(4))).contains("too long"));
    assert!(spoil(images, &idx(&[3, 28, 28], &[])[..9]).contains("the header alone has 16"));
    assert!(spoil(images, &[]).contains("truncated"));
    assert!(spoil(images, &idx(&[3], &[1, 2, 3])).contains("not with IDX's [0, 0, 8, 3]"));
    assert!(spoil(images, &idx(&[3, 32, 32], &vec![0; 3072])).contains("28×28"));
    assert!(spoil(images, &idx(&[0, 28, 28], &[])).contains("28×28"));
    assert!(spoil(images, &idx(&[u32::MAX; 3], &[])).contains("truncated"));
    assert!(spoil(labels, &idx(&[3], &[1, 2, 3])).contains("3 labels for 2 images"));
    assert!(spoil(labels, &idx(&[2], &[1, 10])).contains("label 10 of example 1"));

    let packed = gz(&idx(&[2, 28, 28], &pixels(2)));
    let images = "t10k-images-idx3-ubyte.gz";
    assert!(spoil(images, &packed[..packed.len() / 2]).contains("truncated"));
    assert!(spoil(images, b"not gzip at all").contains("not gzip"));

    let data = small_mnist();
    fs::remove_file(data.path().join("mnist").join("t10k-labels-idx1-ubyte")).unwrap();
    assert!(error(data.path(), "t10k-labels-idx1-ubyte").contains("no such file"));
}

#[test]
fn a_folder_without_mnist_gives_the_synthetic_set() {
    let data = tempfile::tempdir().unwrap();
    let d = Digits::load_from(Some(data.path())).unwrap();
    assert!(d.source.starts_with("synthetic digits (no folder "));
    assert_eq!((d.train_images.size(), d.test_images.size()), (vec![12_000, 784], vec![2_000, 784]));
}

#[test]
fn real_mnist() {
    let Some(data) = support::data("mnist") else { return };
    let d = Digits::load_from(Some(&data)).unwrap();
    assert_eq!((d.train_images.size(), d.test_images.size()), (vec![60_000, 784], vec![10_000, 784]));
    // The first labels of the training set, and its published mean intensity.
    assert_eq!(ints(&d.train_labels.narrow(0, 0, 5)), [5, 0, 4, 1, 9]);
    assert!((d.train_images.mean(Kind::Double).double_value(&[]) - 0.1307).abs() < 1e-4);
}

/// The sums and counts of the published file.
#[test]
fn handwritten_digits() {
    let all = handwritten::all().unwrap();
    assert_eq!((all.images.size(), all.images.kind(), all.len()), (vec![1797, 64], Kind::Float, 1797));
    let counts = (0..10).map(|class| subset(&all.labels, &[class]).numel()).collect::<Vec<_>>();
    assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    // Sixteenths are exact in f32.
    assert_eq!((&all.images * 16.0).sum(Kind::Double).double_value(&[]), 561_718.0);
    assert_eq!(
        Vec::<f32>::try_from(all.images.get(0).narrow(0, 0, 8) * 16.0).unwrap(),
        [0., 0., 5., 13., 9., 1., 0., 0.]
    );
    assert_eq!(all.images.max().double_value(&[]), 1.0);

    let Forms { train, validation, test } = Forms::new().unwrap();
    assert_eq!([train.len(), validation.len(), test.len()], [386, 390, 1021]);
    let parts = [&train, &validation, &test];
    assert!(Tensor::cat(&parts.map(|p| &p.images), 0).equal(&all.images));
    assert!(Tensor::cat(&parts.map(|p| &p.labels), 0).equal(&all.labels));
    // Forms begin with 0 to 9, twice, and go on with the same digits; the first three and the next three are whole but
    // for four digits of one.
    let labels = ints(&all.labels);
    for start in [0, 130, 256, 386, 516, 646, 776] {
        assert_eq!(labels[start..start + 64], labels[..64], "{start}");
    }
    assert!(train.at(&subset(&train.labels, &[3])).labels.eq(3).all().int64_value(&[]) == 1);
}

#[test]
fn synthetic_digits() {
    let d = Digits::synthetic(207, 50, 3);
    assert_eq!((d.train_images.size(), d.test_images.size()), (vec![207, 784], vec![50, 784]));
    assert_eq!((d.train_images.kind(), d.train_labels.kind()), (Kind::Float, Kind::Int64));
    assert!(d.train_images.min().double_value(&[]) == 0.0 && d.train_images.max().double_value(&[]) <= 1.0);
    for class in 0..10 {
        let count = subset(&d.train_labels, &[class]).size()[0];
        assert_eq!(count, if class < 7 { 21 } else { 20 }, "examples of class {class}");
    }
    // Nothing blank, nothing blotted.
    let ink = d.train_images.mean_dim([1_i64].as_slice(), false, Kind::Double);
    assert!(ink.min().double_value(&[]) > 0.01 && ink.max().double_value(&[]) < 0.4);

    let same = Digits::synthetic(207, 50, 3);
    assert!(d.train_images.equal(&same.train_images) && d.train_labels.equal(&same.train_labels));
    assert!(d.test_images.equal(&same.test_images));
    assert!(!d.train_images.equal(&Digits::synthetic(207, 50, 4).train_images));
    assert!(!d.train_images.narrow(0, 0, 50).equal(&d.test_images));
    assert_eq!(d.to_device(tch::Device::Cpu).source, "synthetic digits");
    assert_eq!(Digits::synthetic(0, 1, 0).train_images.size(), [0, 784]);
}

#[test]
fn letters_look_like_digits_in_brightness() {
    let l = letters(400, 0);
    assert_eq!((l.size(), l.kind()), (vec![400, 784], Kind::Float));
    assert!(l.equal(&letters(400, 0)) && !l.equal(&letters(400, 1)));
    let d = Digits::synthetic(400, 0, 0).train_images;
    let mean = |x: &Tensor| x.mean(Kind::Double).double_value(&[]);
    assert!((mean(&l) / mean(&d) - 1.0).abs() < 0.2, "{} against {}", mean(&l), mean(&d));
}

#[test]
fn rotation_by_90_degrees() {
    let x = Tensor::arange(2 * 784, (Kind::Float, tch::Device::Cpu)).view([2, 784]);
    let turned = rotate90(&x);
    // Counter-clockwise: the right end of the first row comes to its left end.
    assert_eq!(turned.double_value(&[0, 0]), 27.0);
    assert!(!turned.equal(&x));
    assert!(rotate90(&rotate90(&rotate90(&turned))).equal(&x));
}

#[test]
fn subset_keeps_the_order() {
    let labels = Tensor::from_slice(&[3_i64, 1, 4, 1, 5, 9, 2, 6]);
    assert_eq!(ints(&subset(&labels, &[1, 9])), [1, 3, 5]);
    assert_eq!(ints(&subset(&labels, &[0])), [0_i64; 0]);
}

#[test]
fn mini_batches_cover_every_example_once() {
    let x = Tensor::arange(10, (Kind::Int64, tch::Device::Cpu));
    let y = &x * 2;
    let visit = |b: Batches| {
        let (mut sizes, mut seen) = (Vec::new(), Vec::new());
        for (x, y) in b {
            assert!((&x * 2).equal(&y));
            sizes.push(x.size()[0]);
            seen.extend(ints(&x));
        }
        (sizes, seen)
    };
    let epoch = batches(&x, &y, 4, 7, Last::Keep);
    assert_eq!(epoch.len(), 3);
    let (sizes, seen) = visit(epoch);
    assert_eq!(sizes, [4, 4, 2]);
    assert_eq!(visit(batches(&x, &y, 4, 7, Last::Keep)).1, seen);
    assert_ne!(visit(batches(&x, &y, 4, 8, Last::Keep)).1, seen);
    let mut sorted = seen.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..10).collect::<Vec<_>>());

    let epoch = batches(&x, &y, 4, 7, Last::Drop);
    assert_eq!(epoch.len(), 2);
    let (sizes, kept) = visit(epoch);
    assert_eq!((sizes.as_slice(), kept.as_slice()), ([4, 4].as_slice(), &seen[..8]));
    assert_eq!(visit(batches(&x, &y, 11, 7, Last::Drop)).0, [0_i64; 0]);
    assert_eq!(visit(batches(&x, &y, 11, 7, Last::Keep)).0, [10]);
}

#[test]
fn two_moons() {
    let (x, y) = moons(101, 0.0, 0);
    assert_eq!((x.size(), y.size()), (vec![101, 2], vec![101]));
    assert_eq!(ints(&y).iter().sum::<i64>(), 50);
    // Without noise each point is on its half circle.
    for (i, class) in ints(&y).into_iter().enumerate() {
        let (u, v) = (x.double_value(&[i as i64, 0]), x.double_value(&[i as i64, 1]));
        let (u, v) = if class == 0 { (u, v) } else { (1.0 - u, 0.5 - v) };
        assert!((u.hypot(v) - 1.0).abs() < 1e-6 && v > -1e-6, "point {i}");
    }
    let (noisy, _) = moons(101, 0.1, 0);
    assert!(noisy.equal(&moons(101, 0.1, 0).0) && !noisy.equal(&moons(101, 0.1, 1).0));
    let spread = (noisy - x).std(true).double_value(&[]);
    assert!((spread - 0.1).abs() < 0.02, "{spread}");
}

#[test]
fn generator_has_the_right_moments() {
    let mut rng = Rng::new(1, 2);
    let n = 20_000;
    let normals: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
    let moment = |k: i32| normals.iter().map(|z| z.powi(k)).sum::<f64>() / f64::from(n);
    assert!(moment(1).abs() < 0.03 && (moment(2) - 1.0).abs() < 0.05 && (moment(4) - 3.0).abs() < 0.3);
    let mut counts = [0; 7];
    (0..n).for_each(|_| counts[rng.below(7)] += 1);
    assert!(counts.iter().all(|&c| (f64::from(c) - f64::from(n) / 7.0).abs() < 250.0), "{counts:?}");
    assert_ne!(Rng::new(1, 2).bits(), Rng::new(2, 1).bits());
}

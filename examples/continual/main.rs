//! Continual learning in pictures: one task after the other, and what each method keeps.
//!
//! `cargo run --release --example continual [-- --quick] [OUTPUT_FOLDER]` (default `target/continual`). Digits of MNIST if
//! `$TCH_BLR_DATA/mnist` holds its IDX files, else digits that the example draws itself; `--quick` takes fewer of
//! them. Writes pictures, `report.json` with every number, and `index.html`, which shows all of it.

#[path = "../common/digits.rs"]
mod digits;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/pictures.rs"]
mod pictures;
#[path = "../common/sheets.rs"]
mod sheets;
#[path = "../common/tasks.rs"]
mod tasks;

mod images;
mod page;
mod plane;

use digits::Digits;
use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let (mut quick, mut folder) = (false, PathBuf::from("target/continual"));
    for argument in std::env::args_os().skip(1) {
        match argument.to_str() {
            Some("--quick") => quick = true,
            Some(option) if option.starts_with('-') => {
                return Err(format!("unknown option {option}: there is --quick").into());
            }
            _ => folder = PathBuf::from(argument),
        }
    }
    std::fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
    let started = Instant::now();
    let mut page = page::Page::default();
    println!("1. Five tasks along the plane");
    plane::run(&folder, quick, &mut page)?;
    println!("\n2. Digits with their pixels in another order in each task");
    images::run(&Digits::load()?, &folder, quick, &mut page)?;
    page.write(&folder, started.elapsed().as_secs_f64())?;
    println!("\nPictures, report.json and index.html: {}", folder.display());
    Ok(())
}

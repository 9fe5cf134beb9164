//! Files changed at random: bytes, the header, the description in it, numbers. What a loader makes of one must be an
//! error or something usable. Always the same ones for a seed. (tch-blr's tests/fuzz.rs takes this file, too.)

use serde_json::{Value, json};

/// xorshift64*
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }

    fn one<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// A safetensors file taken apart.
#[derive(Debug, Clone)]
pub struct Parts {
    pub header: Value,
    pub data: Vec<u8>,
}

impl Parts {
    /// None if there is no header that can be read.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (header, data) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        Some(Parts { header: serde_json::from_slice(header).ok()?, data: data.to_vec() })
    }

    pub fn bytes(&self) -> Vec<u8> {
        let header = self.header.to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }

    /// The description of tch-blr, if there is one that can be read.
    pub fn description(&self) -> Option<Value> {
        serde_json::from_str(self.header["__metadata__"]["tch_blr"].as_str()?).ok()
    }
}

/// The file with one to three changes.
pub fn changed(file: &Parts, random: &mut Random) -> Vec<u8> {
    let mut file = file.clone();
    for _ in 0..=random.below(3) {
        match random.below(9) {
            0 => return garbled(file.bytes(), random),
            1 | 2 => change_value(&mut file.header, random),
            3 => change_number(&mut file.data, random),
            4 => change_shape(&mut file.header, random),
            _ => {
                // What is special about our files, and so most of the changes.
                let Some(mut description) = file.description() else { continue };
                match description.get_mut("content") {
                    Some(content) if random.below(16) > 0 => change_value(content, random),
                    _ => change_value(&mut description, random),
                }
                let place = file.header.get_mut("__metadata__").and_then(|m| m.get_mut("tch_blr"));
                *place.expect("it has just been read") = Value::String(description.to_string());
            }
        }
    }
    file.bytes()
}

/// Bytes overwritten, put in, cut out or cut off.
pub fn garbled(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(4) {
            _ if bytes.is_empty() => {}
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes.insert(at, random.next() as u8),
            2 => drop(bytes.drain(at..bytes.len().min(at + 1 + random.below(16)))),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// One of the values in a tree: another one in its place, or an entry more or less.
pub fn change_value(tree: &mut Value, random: &mut Random) {
    fn size(value: &Value) -> usize {
        1 + match value {
            Value::Array(all) => all.iter().map(size).sum::<usize>(),
            Value::Object(all) => all.values().map(size).sum(),
            _ => 0,
        }
    }
    /// The one at this place, counted from the root downwards.
    fn at(value: &mut Value, place: usize) -> &mut Value {
        if place == 0 {
            return value;
        }
        let mut place = place - 1;
        let children: Vec<&mut Value> = match value {
            Value::Array(all) => all.iter_mut().collect(),
            Value::Object(all) => all.values_mut().collect(),
            _ => unreachable!("it has no others below it"),
        };
        for child in children {
            let below = size(child);
            if place < below {
                return at(child, place);
            }
            place -= below;
        }
        unreachable!("places are below the size")
    }
    let count = size(tree);
    let other = at(tree, random.below(count)).clone();
    let value = at(tree, random.below(count));
    match (random.below(6), &mut *value) {
        (0, Value::Array(all)) if !all.is_empty() => drop(all.swap_remove(random.below(all.len()))),
        (1, Value::Array(all)) => all.push(other),
        (0 | 1, Value::Object(all)) if !all.is_empty() => {
            let key = all.keys().nth(random.below(all.len())).unwrap().clone();
            let taken = all.remove(&key).unwrap();
            if random.below(2) == 0 {
                all.insert(format!("{key}x"), taken);
            }
        }
        (2, Value::Number(n)) => {
            let x = n.as_f64().unwrap_or(0.0);
            *value = random
                .one(&[json!(-x), json!(x + 1.0), json!((x as i64).saturating_sub(1)), json!(x * 1e10), json!(x * 0.5)])
                .clone();
        }
        (2, Value::Bool(b)) => *b = !*b,
        (2, Value::String(s)) => s.push('\u{0}'),
        (3, _) => *value = other,
        _ => *value = hostile(random),
    }
}

fn hostile(random: &mut Random) -> Value {
    let number = json!(random.next());
    let values = [
        json!(null),
        json!(true),
        json!(""),
        json!("w"),
        json!([]),
        json!({}),
        json!(0),
        json!(-1),
        json!(1),
        json!(2),
        json!(1u64 << 32),
        json!(1u64 << 48),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(1.0),
        json!(-0.0),
        json!(5e-324),
        json!(1e-40),
        json!(1e39),
        json!(1e300),
        json!(f64::MAX),
        json!([-2, -3]),
        json!([0, i64::MAX]),
        json!([1u64 << 32, 1u64 << 32]),
        json!(["w", "w"]),
        json!({"MonteCarlo": {"samples": 1u64 << 50}}),
        json!({"Antithetic": {"pairs": 1u64 << 63}}),
        number,
    ];
    random.one(&values).clone()
}

/// A number of the data that is none, or has no place where it is.
fn change_number(data: &mut [u8], random: &mut Random) {
    let numbers = [f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-42, 0.0, -1.0].map(f32::to_le_bytes);
    let place = random.below(data.len() / 4);
    if let Some(bytes) = data.chunks_exact_mut(4).nth(place) {
        bytes.copy_from_slice(&numbers[random.below(numbers.len())]);
    }
}

/// A tensor's size in another shape, which the header alone cannot show to be wrong.
fn change_shape(header: &mut Value, random: &mut Random) {
    let Some(tensors) = header.as_object_mut() else { return };
    let count = tensors.len();
    let Some(tensor) = tensors.values_mut().nth(random.below(count)) else { return };
    let Some(shape) = tensor.get("shape").and_then(Value::as_array) else { return };
    let size = shape.iter().filter_map(Value::as_u64).fold(1u64, u64::saturating_mul);
    tensor["shape"] = random.one(&[json!([size]), json!([size, 1]), json!([1, size]), json!([1, 1, size, 1])]).clone();
}

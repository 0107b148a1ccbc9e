//! Parameters in and out: fresh ones, from a model directory, to a model directory.
//!
//! Nothing here holds a model: a parameter goes from the file into its planned place, and from there
//! through one small buffer into the new file. A fresh element is a pure function of (seed, parameter
//! name, index), so that a model made on disk by `init` and one made in the arena are the same.

use std::path::Path;
use std::sync::Arc;

use ounce_exec::Buffers;
use ounce_io::{ByteSink, Disk, Dtype, GgufModel, SafetensorsDir, SafetensorsWriter, TensorSpec};
use ounce_ir::{DType, EntityId, Graph, Init, Param, ParamId};
use ounce_kernels::philox::philox4x32_10;
use ounce_models::{ModelConfig, alternative_name, is_ignored_tensor};

use crate::{Error, Result};

/// What the header of a fresh model says.
const FRESH: (&str, &str) = ("ounce.weights", "fresh");

/// Elements per piece when parameters are made or converted outside their place.
pub(crate) const PIECE_ELEMS: usize = 16 << 10;

/// Fills `dst` with elements `start..` of a fresh parameter. `start` is a multiple of 4.
///
/// Normal numbers come from Philox words in pairs by the transform of `[BoxMuller58]`.
pub(crate) fn fill_fresh(param: &Param, seed: u64, start: usize, dst: &mut [f32]) {
    let std = match param.init {
        Init::Zeros => return dst.fill(0.0),
        Init::Ones => return dst.fill(1.0),
        Init::Normal(std) => std,
    };
    let name = name_key(&param.name);
    let key = [seed as u32, (seed >> 32) as u32];
    for (i, group) in dst.chunks_mut(4).enumerate() {
        let at = (start / 4 + i) as u64;
        let counter = [at as u32, (at >> 32) as u32, name as u32, (name >> 32) as u32];
        let words = philox4x32_10(counter, key);
        let (a, b) = (normal_pair(words[0], words[1]), normal_pair(words[2], words[3]));
        for (x, normal) in group.iter_mut().zip([a.0, a.1, b.0, b.1]) {
            *x = (normal * f64::from(std)) as f32;
        }
    }
}

/// Two independent standard normal numbers from two random words.
fn normal_pair(a: u32, b: u32) -> (f64, f64) {
    // In (0, 1]: the logarithm of 0 does not exist.
    let u = (f64::from(a) + 1.0) / 4294967296.0;
    let angle = std::f64::consts::TAU * f64::from(b) / 4294967296.0;
    let radius = (-2.0 * libm::log(u)).sqrt();
    (radius * libm::cos(angle), radius * libm::sin(angle))
}

/// FNV-1a, 64 bits.
fn name_key(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The graph's parameters as tensors of a file, in `ParamId` order.
pub(crate) fn specs(graph: &Graph) -> Vec<TensorSpec> {
    let spec = |p: &Param| TensorSpec {
        name: p.name.clone(),
        dtype: on_disk(p.dtype),
        shape: p.shape.dims.iter().map(|&d| d as usize).collect(),
    };
    graph.params.values().map(spec).collect()
}

/// The element type in a file of what is stored in `dtype`.
pub(crate) fn on_disk(dtype: DType) -> Dtype {
    match dtype {
        DType::Bf16 => Dtype::Bf16,
        DType::I16 => Dtype::I16,
        _ => Dtype::F32,
    }
}

/// Whether the weights in `dir` say that they are random, as `init` makes them.
pub(crate) fn are_fresh(dir: &Path) -> bool {
    SafetensorsDir::open(dir).is_ok_and(|dir| says_fresh(&dir))
}

fn says_fresh(dir: &SafetensorsDir) -> bool {
    dir.metadata().get(FRESH.0).is_some_and(|v| v == FRESH.1)
}

/// Writes `model.safetensors` of a fresh model into `dir`, piece by piece.
pub(crate) fn write_fresh(dir: &Path, graph: &Graph, seed: u64) -> Result<()> {
    let path = dir.join("model.safetensors");
    let mut file = SafetensorsWriter::create(&path, &specs(graph), &[FRESH])?;
    let mut piece = vec![0.0; PIECE_ELEMS];
    for param in graph.params.values() {
        let n_elems = param.shape.row_elems() as usize;
        for start in (0..n_elems).step_by(PIECE_ELEMS) {
            let part = &mut piece[..PIECE_ELEMS.min(n_elems - start)];
            fill_fresh(param, seed, start, part);
            file.append_f32(&param.name, part)?;
        }
    }
    Ok(file.finish()?)
}

/// Writes `model.safetensors` into `dir` from the parameters in the arena.
pub(crate) fn write(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    graph: &Graph,
    buffers: &mut Buffers<'_>,
) -> Result<()> {
    let path = dir.join("model.safetensors");
    let mut file = SafetensorsWriter::create_on(disk.clone(), &path, &specs(graph), &[])?;
    append_params(&mut file, graph, buffers)?;
    Ok(file.finish()?)
}

/// The first parameter in the arena that holds a number which is not finite.
pub(crate) fn first_non_finite(graph: &Graph, buffers: &mut Buffers<'_>) -> Option<String> {
    let check = |param: &Param, part: &[f32]| {
        if part.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(param.name.clone()) }
    };
    each_piece(graph, buffers, check).err()
}

/// Appends every parameter as ops read it: a bf16 one is its rounded half.
pub(crate) fn append_params<F: ByteSink>(
    file: &mut SafetensorsWriter<F>,
    graph: &Graph,
    buffers: &mut Buffers<'_>,
) -> Result<()> {
    each_piece(graph, buffers, |param, part| Ok(file.append_f32(&param.name, part)?))
}

/// Hands out every parameter in the arena, piece by piece; stops at the first error.
fn each_piece<E>(
    graph: &Graph,
    buffers: &mut Buffers<'_>,
    mut take: impl FnMut(&Param, &[f32]) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut piece = vec![0.0; PIECE_ELEMS];
    for (id, param) in graph.params.iter() {
        let n_elems = param.shape.row_elems() as usize;
        for start in (0..n_elems).step_by(PIECE_ELEMS) {
            let part = &mut piece[..PIECE_ELEMS.min(n_elems - start)];
            buffers.read_param(id, start, part);
            take(param, part)?;
        }
    }
    Ok(())
}

/// Where tensors are read from: both have Hugging Face's names and layout.
enum Tensors {
    Safetensors(SafetensorsDir),
    Gguf(GgufModel),
}

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        let is_gguf = path.is_file() && ounce_io::is_gguf(path)?;
        Ok(if is_gguf {
            Self::Gguf(GgufModel::open(path)?)
        } else {
            Self::Safetensors(SafetensorsDir::open(path)?)
        })
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Self::Safetensors(dir) => Some(dir.get(name)?.shape.clone()),
            Self::Gguf(model) => model.shape(name),
        }
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(dir) => dir.tensors().map(|t| t.name.clone()).collect(),
            Self::Gguf(model) => model.tensor_names().collect(),
        }
    }

    fn read_at(&self, name: &str, start: usize, dst: &mut [f32]) -> Result<()> {
        match self {
            Self::Safetensors(dir) => dir.read_f32_at(name, start, dst)?,
            Self::Gguf(model) => model.read_f32_at(name, start, dst)?,
        }
        Ok(())
    }
}

/// The tensors of a model, matched with the parameters of a graph.
pub(crate) struct Source {
    tensors: Tensors,
    /// Name in the file, by `ParamId`.
    names: Vec<String>,
}

impl Source {
    /// Opens the weights, of a directory or in a GGUF file, and checks that every parameter is there in its
    /// shape, and nothing else.
    pub(crate) fn open(path: &Path, config: &ModelConfig, graph: &Graph) -> Result<Self> {
        let tensors = Tensors::open(path)?;
        let mut names = Vec::with_capacity(graph.params.len());
        for param in graph.params.values() {
            let candidates = [Some(param.name.as_str()), alternative_name(&param.name)];
            let found = candidates
                .into_iter()
                .flatten()
                .find_map(|name| Some((name, tensors.shape(name)?)));
            let Some((name, shape)) = found else {
                return Err(mismatch(path, &param.name, "is missing"));
            };
            let want: Vec<usize> = param.shape.dims.iter().map(|&d| d as usize).collect();
            if shape != want {
                let what = format!("has shape {shape:?}, the configuration says {want:?}");
                return Err(mismatch(path, name, &what));
            }
            names.push(name.to_owned());
        }
        let known: std::collections::BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let all = tensors.names();
        let stranger =
            all.iter().find(|t| !known.contains(t.as_str()) && !is_ignored_tensor(config, t));
        match stranger {
            Some(t) => Err(mismatch(path, t, "is not a parameter of this configuration")),
            None => Ok(Self { tensors, names }),
        }
    }

    /// Whether the file says that its weights are random, as `init` makes them.
    pub(crate) fn is_fresh(&self) -> bool {
        match &self.tensors {
            Tensors::Safetensors(dir) => says_fresh(dir),
            Tensors::Gguf(_) => false,
        }
    }

    /// Reads elements of a parameter, from `start` on.
    pub(crate) fn read(&self, id: ParamId, start: usize, dst: &mut [f32]) -> Result<()> {
        self.tensors.read_at(&self.names[id.index()], start, dst)
    }
}

fn mismatch(path: &Path, tensor: &str, what: &str) -> Error {
    Error::Input {
        message: format!("{}: tensor `{tensor}` {what}", path.display()),
        hint: "config.json and the weights must belong to the same model".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ounce_models::{Purpose, build};

    fn model(text: &str) -> (ModelConfig, Graph) {
        let config = ModelConfig::from_json(text).unwrap();
        let graph = build(&config, Purpose::Loss, 0.0).unwrap();
        (config, graph)
    }

    const TINY: &str = r#"{"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2,
        "vocab_size": 97, "n_positions": 32}"#;

    #[test]
    fn fresh_weights_have_the_declared_spread_and_depend_on_seed_and_name() {
        let (_, graph) = model(TINY);
        let (_, wte) = graph.params.iter().find(|(_, p)| p.name.ends_with("wte.weight")).unwrap();
        let make = |seed| {
            let mut x = vec![0.0; wte.shape.row_elems() as usize];
            fill_fresh(wte, seed, 0, &mut x);
            x
        };
        let x = make(1);
        let mean = x.iter().sum::<f32>() / x.len() as f32;
        let std = (x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / x.len() as f32).sqrt();
        assert!(mean.abs() < 2e-3 && (std - 0.02).abs() < 2e-3, "mean {mean}, std {std}");
        assert_ne!(x, make(2));
    }

    #[test]
    fn pieces_of_a_fresh_parameter_are_parts_of_the_whole() {
        let (_, graph) = model(TINY);
        let (_, wte) = graph.params.iter().find(|(_, p)| p.name.ends_with("wte.weight")).unwrap();
        let (mut whole, mut part) = ([0.0; 64], [0.0; 10]);
        fill_fresh(wte, 7, 0, &mut whole);
        fill_fresh(wte, 7, 20, &mut part);
        assert_eq!(part, whole[20..30]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (config, graph) = model(TINY);
        let dir = tempfile::tempdir().unwrap();
        write_fresh(dir.path(), &graph, 3).unwrap();
        let source = Source::open(dir.path(), &config, &graph).unwrap();
        assert!(source.is_fresh());
        for (id, param) in graph.params.iter() {
            let n = param.shape.row_elems() as usize;
            let (mut read, mut made) = (vec![0.0; n], vec![0.0; n]);
            source.read(id, 0, &mut read).unwrap();
            fill_fresh(param, 3, 0, &mut made);
            assert_eq!(read, made, "{}", param.name);
        }
    }

    #[test]
    fn weights_of_another_model_are_refused_by_tensor() {
        let (_, graph) = model(TINY);
        let dir = tempfile::tempdir().unwrap();
        write_fresh(dir.path(), &graph, 3).unwrap();
        let other = TINY.replace("\"n_layer\": 1", "\"n_layer\": 2");
        let (config, graph) = model(&other);
        let e = Source::open(dir.path(), &config, &graph).err().unwrap().to_string();
        assert!(e.contains("tensor `transformer.h.1."), "{e}");
        let other = TINY.replace("\"vocab_size\": 97", "\"vocab_size\": 98");
        let (config, graph) = model(&other);
        let e = Source::open(dir.path(), &config, &graph).err().unwrap().to_string();
        assert!(e.contains("has shape [97, 32], the configuration says [98, 32]"), "{e}");
    }
}

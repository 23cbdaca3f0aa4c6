//! Model names, bounded: what a client writes into `model` must not be able to mint metric series or buckets without end.
//!
//! A name becomes a [`ModelId`] when the configuration has it, or when the gateway has answered a request for it with
//! success; of the latter at most [`MAX_LEARNED`] are kept. Every other name is [`ModelId::OTHER`].

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::config::STAND_INS;

/// Names that one process takes in from one configuration after another: each may have metrics.
pub const MAX_NAMES: usize = 10_000;

/// How many names are learned from successful answers, besides those of the configuration.
pub const MAX_LEARNED: usize = 256;

/// A longer name is not worth a label.
const MAX_NAME_BYTES: usize = 200;

/// A model that is known by name, or one of the two that stand for the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(u16);

impl ModelId {
    /// A call that names no model, such as `GET /v1/models`. Its label is `-`.
    pub const NONE: Self = Self(0);
    /// Every model that is not known by name. Its label is `other`.
    pub const OTHER: Self = Self(1);

    /// A small number, dense from 0, to index tables by.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Every model known by name.
#[derive(Debug)]
pub struct Models {
    names: RwLock<Names>,
}

#[derive(Debug)]
struct Names {
    by_name: HashMap<Arc<str>, ModelId>,
    by_id: Vec<Arc<str>>,
    /// How many names there may be before no more are learned.
    capacity: usize,
}

impl Models {
    /// Knows the configuration's names from the start.
    pub fn new<'n>(configured: impl IntoIterator<Item = &'n str>) -> Self {
        let mut names = Names { by_name: HashMap::new(), by_id: Vec::new(), capacity: 0 };
        for stand_in in STAND_INS {
            names.add(stand_in);
        }
        for name in configured {
            names.add(name);
        }
        // A client that names its model "-" must not be counted among the calls that name none.
        names.by_name.insert(STAND_INS[ModelId::NONE.index()].into(), ModelId::OTHER);
        names.capacity = names.by_id.len() + MAX_LEARNED;
        Self { names: RwLock::new(names) }
    }

    /// Knows the names of another configuration too. Those that it does not have any more are known as before.
    ///
    /// # Errors
    /// There have been too many names since the start; none is taken in.
    pub fn configure<'n>(&self, configured: impl IntoIterator<Item = &'n str>) -> Result<(), String> {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<&str> = configured.into_iter().filter(|name| !names.by_name.contains_key(*name)).collect();
        if !new.is_empty() && names.by_id.len() + new.len() > MAX_NAMES {
            return Err(format!("there have been more than {MAX_NAMES} names of models since weir started"));
        }
        names.capacity += new.len();
        for name in new {
            names.add(name);
        }
        Ok(())
    }

    /// The model of that name, or [`ModelId::OTHER`].
    pub fn find(&self, name: &str) -> ModelId {
        self.read(|names| names.by_name.get(name).copied().unwrap_or(ModelId::OTHER))
    }

    /// The model of that name, which the gateway has just served: it is known by name from now on, while there is room.
    pub fn learn(&self, name: &str) -> ModelId {
        let known = self.find(name);
        if known != ModelId::OTHER || name.is_empty() || name.len() > MAX_NAME_BYTES {
            return known;
        }
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        match names.by_name.get(name) {
            Some(id) => *id,
            None if names.by_id.len() < names.capacity => names.add(name),
            None => ModelId::OTHER,
        }
    }

    /// The name that stands for the model in labels and messages.
    pub fn name(&self, id: ModelId) -> Arc<str> {
        self.read(|names| Arc::clone(&names.by_id[id.index()]))
    }

    /// Every model known now.
    pub fn all(&self) -> Vec<ModelId> {
        let known = self.read(|names| names.by_id.len());
        (0..known).map(|index| ModelId(u16::try_from(index).expect("there are fewer than 65,536 models"))).collect()
    }

    fn read<T>(&self, look: impl FnOnce(&Names) -> T) -> T {
        look(&self.names.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Names {
    fn add(&mut self, name: &str) -> ModelId {
        let name: Arc<str> = name.into();
        let id = ModelId(u16::try_from(self.by_id.len()).expect("there are fewer than 65,536 models"));
        self.by_id.push(Arc::clone(&name));
        self.by_name.insert(name, id);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_known_from_the_configuration_or_after_a_success() {
        let models = Models::new(["gpt-4.1-mini"]);
        assert_ne!(models.find("gpt-4.1-mini"), ModelId::OTHER);
        assert_eq!(models.find("deepseek-chat"), ModelId::OTHER);
        let learned = models.learn("deepseek-chat");
        assert_eq!((models.find("deepseek-chat"), &*models.name(learned)), (learned, "deepseek-chat"));
    }

    #[test]
    fn names_are_bounded_in_number_and_length() {
        let models = Models::new([]);
        for i in 0..10_000 {
            models.learn(&format!("model-{i}"));
        }
        assert_eq!(models.all().len(), 2 + MAX_LEARNED);
        assert_eq!(models.learn(&"x".repeat(10_000)), ModelId::OTHER);
    }

    #[test]
    fn another_configurations_names_are_known_too_and_take_no_learned_ones_place() {
        let models = Models::new(["a"]);
        let a = models.find("a");
        models.configure(["b", "c"]).expect("few enough");
        assert!(models.find("b") != ModelId::OTHER && models.find("a") == a);
        for i in 0..1000 {
            models.learn(&format!("model-{i}"));
        }
        assert_eq!(models.all().len(), 2 + 3 + MAX_LEARNED);
        let many: Vec<String> = (0..MAX_NAMES).map(|i| format!("configured-{i}")).collect();
        let refused = models.configure(many.iter().map(String::as_str)).expect_err("too many");
        assert!(refused.contains("10000") && models.find("configured-0") == ModelId::OTHER, "{refused}");
        let more = Models::new(many.iter().map(String::as_str));
        assert_eq!(more.configure(many.iter().map(String::as_str)), Ok(()), "none is new");
    }

    #[test]
    fn the_two_stand_ins_cannot_be_taken() {
        let models = Models::new([]);
        assert_eq!(models.learn("other"), ModelId::OTHER);
        assert_eq!(models.learn("-"), ModelId::OTHER);
        assert_eq!(&*models.name(ModelId::NONE), "-");
    }
}

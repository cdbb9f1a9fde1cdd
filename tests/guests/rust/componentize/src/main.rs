//! `componentize MODULE COMPONENT`: wraps a core module that carries its world
//! in a custom section (as wit-bindgen leaves it) into a component.

use std::error::Error;
use std::{env, fs};

use wit_component::ComponentEncoder;

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<String> = env::args().skip(1).collect();
    let [module, component] = paths.as_slice() else {
        return Err("usage: componentize MODULE COMPONENT".into());
    };
    let bytes = ComponentEncoder::default().module(&fs::read(module)?)?.validate(true).encode()?;
    fs::write(component, bytes)?;
    Ok(())
}

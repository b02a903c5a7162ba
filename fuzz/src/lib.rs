//! What fuzz targets share: an input that is taken apart, and a driver that has no manners.

pub mod driver;
pub mod input;

//! Whole-system tests (header to be completed with the API sketch).

pub mod baseline;
pub mod build;
pub mod cpio;
pub mod guest;
pub mod image;
pub mod libvirt;
pub mod netns;
pub mod process;
pub mod qemu;
pub mod reaper;
pub mod site;
pub mod wan;

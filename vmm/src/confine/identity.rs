//! Whose process this is: ids of its own, which nobody else on the host has.
//!
//! A thread without capabilities that is still root's owns root's files and sockets. One of its own ids owns nothing.
//! What it takes to give up, and to find its way to its sockets, the process keeps until each thread has confined itself.

use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::process;

/// Gives the process, which has one thread, this user and this group, and no other group. It keeps its capabilities.
pub fn take(id: u32) -> io::Result<()> {
    if cfg!(feature = "unconfined") {
        return Ok(());
    }
    let held = capabilities(None)?;
    set_keep_capabilities(true)?;
    set_thread_groups(&[])?;
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_keep_capabilities(false)?;
    let kept = CapabilitySets { effective: held.permitted, ..held };
    set_capabilities(None, kept)?;
    // A change of identity takes the signal back.
    process::die_with_parent()
}

/// Makes the calling thread, and no other, one that can make files for any user, if it may choose.
pub fn become_root() -> Result<(), Errno> {
    let may_choose = CapabilitySet::SETUID.union(CapabilitySet::SETGID);
    if !capabilities(None)?.effective.contains(may_choose) {
        return Ok(());
    }
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
}

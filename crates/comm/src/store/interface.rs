//! From the name of a network interface to its address: stores listen on one interface, never on all of them.

use std::net::IpAddr;

use crate::error::{Error, Result};

/// The address of the interface called `name`: IPv4 if it has one.
///
/// # Errors
/// [`Error::Interface`], which lists the interfaces there are.
pub fn interface_address(name: &str) -> Result<IpAddr> {
    let unknown = |there_are: String| Error::Interface { name: name.to_owned(), there_are };
    let interfaces = if_addrs::get_if_addrs().map_err(|error| unknown(error.to_string()))?;
    let addresses =
        || interfaces.iter().filter(|interface| interface.name == name).map(if_addrs::Interface::ip);
    addresses().find(IpAddr::is_ipv4).or_else(|| addresses().next()).ok_or_else(|| {
        let mut names: Vec<&str> = interfaces.iter().map(|interface| interface.name.as_str()).collect();
        names.dedup();
        unknown(names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_its_address_and_others_are_listed() {
        assert!(interface_address("lo").unwrap().is_loopback());
        let error = interface_address("nosuch0").unwrap_err().to_string();
        assert!(
            error.starts_with("this host has no network interface nosuch0 with an address; there are: "),
            "{error}"
        );
        assert!(error.contains("lo"), "{error}");
    }
}

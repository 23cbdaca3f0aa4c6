//! What of a configuration's file somebody needs who wants to ask the weir that runs with it.

use std::path::Path;

use super::reader::{Complaint, Document};
use super::{Address, Complaints, Secret, loopback, read_file};

/// Where operators ask a weir, and the token that it asks of them.
///
/// The rest of the file is not looked at. It may name what only weir has in its environment, such as the gateway's key.
#[derive(Debug)]
pub struct OperatorsAccess {
    pub listen: Address,
    pub token: Option<Secret>,
}

impl OperatorsAccess {
    /// Reads it from a file; the token is looked up in this process's environment.
    ///
    /// # Errors
    /// The file can't be read, is not TOML, or is wrong in these two options.
    pub fn load(path: &Path) -> Result<Self, Complaints> {
        let source = read_file(path)?;
        let document = Document::new(&source);
        let access = document.parse().map(|table| {
            let server = document.root(table.get_ref()).section("server");
            Self {
                listen: server.get_or("admin_listen", loopback(9090)),
                token: Secret::read(&server, "admin_token", &|name| std::env::var(name).ok()),
            }
        });
        let counts = |complaint: &Complaint| {
            matches!(complaint.path.as_str(), "" | "server" | "server.admin_listen" | "server.admin_token")
        };
        let complaints: Vec<Complaint> = document.complaints().into_iter().filter(counts).collect();
        match access {
            Some(access) if complaints.is_empty() => Ok(access),
            _ => Err(Complaints(complaints)),
        }
    }
}

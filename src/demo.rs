//! demo (being written)
pub async fn run(_exit: bool) -> Result<(), String> {
    Ok(())
}

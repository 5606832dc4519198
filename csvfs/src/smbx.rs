pub mod pool {
    #[derive(Debug)] pub struct SmbPool;
    #[derive(Debug)] pub struct PoolConfig { pub workers: usize, pub server: std::net::IpAddr, pub port: u16, pub share: String, pub user: String, pub password: String, pub encrypt: bool, pub program: std::path::PathBuf, pub state_dir: std::path::PathBuf, pub op_timeout: std::time::Duration }
    #[derive(Debug)] pub struct SmbError;
    impl std::error::Error for SmbError {}
    impl std::fmt::Display for SmbError { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str("shim") } }
    impl SmbError { pub fn is_fatal(&self) -> bool { true } pub fn is_rejected(&self) -> bool { true } }
    impl SmbPool { pub fn new(_: PoolConfig) -> Result<SmbPool, SmbError> { Ok(SmbPool) }
      pub fn bytes_moved(&self) -> u64 { 0 }
      pub fn read_at(&self, _: &str, _: u64, _: &mut [u8]) -> Result<usize, SmbError> { Err(SmbError) }
      pub fn write_at(&self, _: &str, _: u64, _: &[u8]) -> Result<(), SmbError> { Err(SmbError) } }
}
pub mod smbd {
    #[derive(Debug)] pub struct Smbd;
    #[derive(Debug)] pub struct SmbdConfig { pub share: String, pub path: std::path::PathBuf, pub addr: std::net::IpAddr, pub port: u16, pub base_dir: std::path::PathBuf, pub run_dir: std::path::PathBuf, pub encrypt: bool, pub user: String, pub password: String }
    impl Smbd { pub fn start(_: SmbdConfig, _: Box<dyn Fn(String) + Send + Sync>) -> Result<Smbd, super::pool::SmbError> { Ok(Smbd) } }
}

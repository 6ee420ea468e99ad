"""Other libraries' doors to tfkern, one file each."""

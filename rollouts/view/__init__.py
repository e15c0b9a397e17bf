"""What people and programs are shown of a run. It reads values and run directories, and changes nothing."""

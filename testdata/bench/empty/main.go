// Command empty does nothing: what the Go runtime alone costs in time, memory and bytes.
package main

func main() {}

// What Terraform's provider for libvirt calls, by the library that it is built on.
package main

import (
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
)

func must(what string, err error) {
	if err != nil {
		fmt.Println("failed:", what, err)
		os.Exit(1)
	}
}

func main() {
	socket, directory, domainXML := os.Args[1], os.Args[2], os.Args[3]
	conn, err := net.DialTimeout("unix", socket, 10*time.Second)
	must("dial", err)
	l := libvirt.New(conn)
	must("connect", l.ConnectToURI(libvirt.ConnectURI("qemu:///system")))
	version, err := l.ConnectGetLibVersion()
	must("version", err)
	capabilities, err := l.ConnectGetCapabilities()
	must("capabilities", err)
	_, err = l.ConnectGetDomainCapabilities(nil, libvirt.OptString{"x86_64"}, nil, nil, 0)
	must("domain capabilities", err)
	fmt.Println("version", version, strings.Contains(string(capabilities), "<host>"))

	pool, err := l.StoragePoolDefineXML("<pool type='dir'><name>tf</name><target><path>"+directory+"/pool</path></target></pool>", 0)
	must("pool define", err)
	must("pool build", l.StoragePoolBuild(pool, 0))
	must("pool create", l.StoragePoolCreate(pool, 0))
	must("pool autostart", l.StoragePoolSetAutostart(pool, 1))
	must("pool refresh", l.StoragePoolRefresh(pool, 0))
	volume, err := l.StorageVolCreateXML(pool, "<volume><name>v</name><capacity unit='bytes'>65536</capacity><target><format type='raw'/></target></volume>", 0)
	must("volume", err)
	must("upload", l.StorageVolUpload(volume, strings.NewReader(strings.Repeat("x", 4096)), 0, 4096, 0))
	_, capacity, _, err := l.StorageVolGetInfo(volume)
	must("volume info", err)
	description, err := l.StorageVolGetXMLDesc(volume, 0)
	must("volume xml", err)
	fmt.Println("volume", capacity, strings.Contains(description, "<key>"))

	defined, err := l.DomainDefineXML(domainXML)
	must("define", err)
	must("autostart", l.DomainSetAutostart(defined, 1))
	must("create", l.DomainCreate(defined))
	state, _, err := l.DomainGetState(defined, 0)
	must("state", err)
	active, err := l.DomainIsActive(defined)
	must("active", err)
	_, err = l.DomainGetXMLDesc(defined, 0)
	must("xml", err)
	_, err = l.DomainInterfaceAddresses(defined, uint32(libvirt.DomainInterfaceAddressesSrcLease), 0)
	must("addresses", err)
	fmt.Println("running", state, active)
	networks, _, err := l.ConnectListAllNetworks(1, 0)
	must("networks", err)
	for _, network := range networks {
		_, err = l.NetworkGetXMLDesc(network, 0)
		must("network xml", err)
		_, _, err = l.NetworkGetDhcpLeases(network, nil, 1, 0)
		must("leases", err)
		fmt.Println("network", network.Name)
	}
	_, err = l.DomainLookupByName("missing")
	fmt.Println("missing", libvirt.IsNotFound(err))
	must("destroy", l.DomainDestroy(defined))
	must("undefine", l.DomainUndefineFlags(defined, libvirt.DomainUndefineNvram|libvirt.DomainUndefineSnapshotsMetadata|libvirt.DomainUndefineManagedSave))
	must("volume delete", l.StorageVolDelete(volume, 0))
	must("pool destroy", l.StoragePoolDestroy(pool))
	must("pool delete", l.StoragePoolDelete(pool, 0))
	must("pool undefine", l.StoragePoolUndefine(pool))
	must("disconnect", l.Disconnect())
	fmt.Println("done")
}
